"""Update the cluster files to the size in `cluster/size.yaml`, the only file with the size of the cluster.

`python cluster/resize.py` rewrites the numbers of machines in `ray_cluster.yaml`, `ray_cluster_8gpu.yaml` and
`cluster/kuberay/raycluster.yaml`, and their `TRANSFGU_NODES`, and nothing else. `--check` writes nothing and exits with
status 1 if a file needs an update.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = ("ray_cluster.yaml", "ray_cluster_8gpu.yaml", "cluster/kuberay/raycluster.yaml")
_A_LARGE_MACHINE = 8  # GPUs

_SIZE = re.compile(r"(?P<head>(?:max_workers|maxReplicas): )\d+(?P<tail> # size: (?P<name>\w+))")
_NODES = re.compile(r"'(?P<nodes>\[\{\"count\": .*?\}\])'")


def sizes() -> dict[str, int]:
    """Return the numbers of machines, by the names in the files' comments.

    Raises:
        SystemExit: `size.yaml` has no positive number of GPUs.
    """
    gpus = yaml.safe_load((ROOT / "cluster" / "size.yaml").read_text())["gpus"]
    if not isinstance(gpus, int) or gpus < 1:
        sys.exit(f"cluster/size.yaml: gpus must be a positive whole number, not {gpus}")
    readers = math.ceil(gpus / 2)
    return {
        "gpu_machines": gpus,
        "cpu_machines": readers,
        "machines": gpus + readers,
        "large_machines": math.ceil(gpus / _A_LARGE_MACHINE),
    }


def resized(text: str, numbers: dict[str, int]) -> str:
    """Return the text of a cluster file with the numbers of machines set."""

    def nodes(match: re.Match[str]) -> str:
        rows = json.loads(match["nodes"])
        for row in rows:
            large = row.get("GPU", 0) == _A_LARGE_MACHINE
            kind = "large_machines" if large else "gpu_machines" if row.get("GPU") else "cpu_machines"
            row["count"] = numbers[kind]
        return f"'{json.dumps(rows)}'"

    text = _SIZE.sub(lambda match: f"{match['head']}{numbers[match['name']]}{match['tail']}", text)
    return _NODES.sub(nodes, text)


def main() -> None:
    """Parse the command line; write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with status 1 if a file needs an update"
    )
    check = parser.parse_args().check
    numbers, stale = sizes(), []
    for name in FILES:
        before = (ROOT / name).read_text()
        after = resized(before, numbers)
        if after != before:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(after)
    print(f"{'outdated' if check else 'changed'}: {', '.join(stale) or 'none'}")
    sys.exit(int(check and bool(stale)))


if __name__ == "__main__":
    main()
