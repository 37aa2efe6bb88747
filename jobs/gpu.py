"""Report results and speed of a GPU: tests against the CPU, a table of timings, the demonstration from end to end.

`make gpu OUT=DIR` calls it. It takes at most twelve minutes, needs no network, and updates `gpu.json` and `gpu.md` in
the folder as it runs. Without a GPU it exits with status 2, unless `--device cpu` selects small sizes.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.runtime import stopping

if __name__ == "__main__":
    stopping.install()  # before the imports below, which take a second

from transfgu.cli.command_line import Parser, run_job

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"tests": 150.0, "arithmetic": 150.0, "stages": 230.0, "shapes": 150.0}
"""Time limit of each part in seconds: less than twelve minutes together."""


def main() -> None:
    """Parse the command line and run all parts, or one of them."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of gpu.json, gpu.md and logs")
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu to try the command at small sizes (default: cuda)"
    )
    parser.add_argument("--part", choices=("arithmetic",), help="run this part only; used by the command itself")
    arguments = parser.parse()
    from transfgu.benchmarks import gpu  # torch takes seconds to import

    device = gpu.choose_device(arguments.device)
    folder = Path(arguments.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        gpu.measure_arithmetic(device, folder / "arithmetic.json")
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if device.type == "cpu":
        os.environ.update(TRANSFGU_DEVICE="cpu", TRANSFGU_GPU_TESTS="cpu")
    found = gpu.report(_parts(device.type, folder), device, folder, lambda text: print(text, flush=True))
    print(f"written to {folder / 'gpu.json'} and {folder / 'gpu.md'}")
    if any(part["status"] != "done" for part in found["parts"]):
        sys.exit(1)


def _parts(device: str, folder: Path) -> list["gpu.Part"]:  # type: ignore[name-defined]  # noqa: F821
    import torch

    from transfgu.benchmarks import gpu

    small, python, run = device == "cpu", sys.executable, folder / "run"
    sizes = gpu.recipe_flags(torch.device(device))
    test = [*(python, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"), str(ROOT / "tests")]
    stages = [
        *(python, str(ROOT / "jobs" / "benchmark.py"), "all", "--preset", "coco-stuff-27", *sizes),
        *("--images", "2" if small else "64", "--repeats", "1" if small else "3"),
        *("--rows", "3000" if small else "500000", "--out", str(folder / "stages.json")),
    ]
    shapes = [python, str(ROOT / "jobs" / "train.py"), "shapes", "--run", str(run)]
    if small:
        shapes += ["--limit", "12", "--epochs", "1"]
    own = [python, str(ROOT / "jobs" / "gpu.py"), "--out", str(folder), "--device", device, "--part", "arithmetic"]
    commands = {
        "tests": (test, lambda: gpu.read_tests(folder / "tests.log")),
        "arithmetic": (own, lambda: gpu.read_measurements(folder / "arithmetic.json")),
        "stages": (stages, lambda: gpu.read_measurements(folder / "stages.json")),
        "shapes": (shapes, lambda: gpu.read_run(run)),
    }
    patience = 4 if small else 1  # the CPU may be slow
    return [
        gpu.Part(name=name, command=command, limit=patience * LIMITS[name], read=read)
        for name, (command, read) in commands.items()
    ]


if __name__ == "__main__":
    run_job(main)
