"""One number sizes every cluster of the project, and on each of them K-Means uses the GPUs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from transfgu.runtime import capacity, spread

ROOT = Path(__file__).parents[2]
WINDOWS = 10_646_000 * 1536  # bytes of the features of COCO-Stuff-27's training images


@pytest.fixture(scope="module")
def resize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resize", ROOT / "cluster" / "resize.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told_nodes(text: str) -> list[dict[str, Any]]:
    found = re.search(r"'(\[\{\"count\".*?\])'", text)
    assert found
    rows: list[dict[str, Any]] = json.loads(found[1])
    return rows


@pytest.mark.processes
def test_the_files_are_in_step_with_the_one_number() -> None:
    done = subprocess.run([sys.executable, "cluster/resize.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "outdated: none\n")


def test_every_number_of_machines_follows(resize: ModuleType) -> None:
    numbers = {"gpu_machines": 64, "cpu_machines": 32, "machines": 96, "large_machines": 9}
    small, large, kuberay = (resize.resized((ROOT / name).read_text(), numbers) for name in resize.FILES)
    config = yaml.safe_load(small)
    assert config["max_workers"] == 96
    kinds = {name: node["max_workers"] for name, node in config["available_node_types"].items() if name != "head"}
    assert {name: kinds[name] for name in kinds if name.startswith("gpu")} == dict.fromkeys(
        ("gpu-l4", "gpu-a10g", "gpu-l40s"), 64
    )
    assert {kinds[name] for name in kinds if name.startswith("cpu")} == {32}
    assert told_nodes(small) == [{"count": 64, "CPU": 4, "GPU": 1}, {"count": 32, "CPU": 16}]
    config = yaml.safe_load(large)
    types = [node for name, node in config["available_node_types"].items() if name != "head"]
    assert {config["max_workers"], *(node["max_workers"] for node in types)} == {9}
    assert told_nodes(large) == [{"count": 9, "CPU": 192, "GPU": 8}]
    groups = {g["groupName"]: g["maxReplicas"] for g in yaml.safe_load(kuberay)["spec"]["workerGroupSpecs"]}
    assert groups == {"gpu": 64, "cpu": 32}
    assert told_nodes(kuberay) == [{"count": 64, "CPU": 4, "GPU": 1}, {"count": 32, "CPU": 16}]


def test_large_machines_pass_rays_schema_and_differ_in_their_workers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # file_mounts are relative
    small, large = (yaml.safe_load(Path(name).read_text()) for name in ("ray_cluster.yaml", "ray_cluster_8gpu.yaml"))
    validate_config(prepare_config(large))
    for node in (node for name, node in large["available_node_types"].items() if name != "head"):
        assert node["resources"] == {"CPU": 192, "GPU": 8}
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for tree in (small, large):
        del tree["max_workers"]
        tree["available_node_types"] = tree["available_node_types"]["head"]
        tree["head_start_ray_commands"] = [re.sub(r"'\[.*?\]'", "", c) for c in tree["head_start_ray_commands"]]
    assert large == small


@pytest.mark.parametrize(
    ("name", "actors"),
    [("ray_cluster.yaml", 8), ("ray_cluster_8gpu.yaml", 8), ("cluster/kuberay/raycluster.yaml", 8)],
)
def test_kmeans_goes_to_the_gpus_of_every_shipped_cluster(
    name: str, actors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    head = {"Alive": True, "Resources": {"CPU": 4.0, "memory": 12e9}}
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    monkeypatch.setenv(capacity.NODES, json.dumps(told_nodes((ROOT / name).read_text())))
    nodes = spread.actor_nodes(WINDOWS)
    assert nodes
    assert all(node["GPU"] > 0 for node in nodes)
    assert spread.actor_count(WINDOWS, nodes) == actors
    assert spread.actor_resources(actors, nodes)["num_gpus"] == 1.0
