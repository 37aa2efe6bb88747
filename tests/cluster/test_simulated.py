"""The simulated cluster, without starting it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from transfgu.runtime import capacity

SCRIPT = Path(__file__).parents[2] / "cluster" / "simulated.py"


@pytest.fixture(scope="module")
def simulated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulated", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_jobs_are_told_of_the_nodes_that_the_autoscaler_may_add(simulated: ModuleType) -> None:
    types = simulated.configuration(3, 6379)["available_node_types"]
    (told,) = json.loads(simulated.environment(3, 6379)[capacity.NODES])
    assert told.pop("count") == types["gpu"]["max_workers"]
    assert told == {name: types["gpu"]["resources"][name] for name in ("CPU", "GPU")}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: command"),
        (["--nodes", "0", "--", "true"], "--nodes must be positive"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_before_anything_starts(arguments: list[str], line: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert line in done.stderr
