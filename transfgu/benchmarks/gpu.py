"""Compare results and speed of a GPU with the CPU, in one command with several parts.

Each part runs in its own process with a time limit, and the report is rewritten after each result, because a borrowed
GPU may be taken back at any time.
"""

import datetime
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from transfgu.benchmarks.arithmetic import Bare, device_name
from transfgu.errors import UserError
from transfgu.planning.measurements import Measurements, Timing
from transfgu.recipe import preset
from transfgu.store import storage

_LOOK_SECONDS = 1.0
_TEST = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b", re.MULTILINE)
_SIZES_ON_CPU = {
    "encoder.name": "vit_shapes",
    "image_size": (64, 64),
    "feature_size": (128, 128),
    "training_size": (64, 64),
    "windows.size": (64, 64),
    "windows.scales": (0.5,),
    "iterations": 5,
}

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process of the report."""

    name: str
    command: Sequence[str]
    limit: float
    """Seconds after which it is stopped."""
    read: Callable[[], dict[str, Any]]
    """Return the results so far, as the report stores them; {} if there are none."""


def choose_device(asked: str) -> torch.device:
    """Return the device to report on.

    Args:
        asked: `cuda`, or `cpu` to try the command itself at small sizes, whose figures mean nothing.

    Raises:
        UserError: another name, or there is no GPU.
    """
    if asked not in ("cuda", "cpu"):
        raise UserError(f"device {asked} is unknown: choose cuda or cpu", code="device-unknown")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} finds no GPU on this machine; to try the command at small sizes on the CPU, "
            "add DEVICE=cpu",
            code="gpu-missing",
        )
    return torch.device(asked)


def benchmark_fields(device: torch.device) -> dict[str, Any]:
    """Return the fields to set on a benchmark's recipe: none on a GPU, tiny images on a CPU."""
    return {} if device.type == "cuda" else dict(_SIZES_ON_CPU)


def report(parts: Sequence[Part], device: torch.device, folder: Path, say: Say = print) -> dict[str, Any]:
    """Run the parts one after another, and update `gpu.json` and `gpu.md` in `folder` with their results.

    Returns:
        The report. `parts` holds for each part its `name`, `status` ("done", "failed", "ended after its limit"),
            `seconds`, and the result of its `read`.
    """
    found: dict[str, Any] = {
        "device": device_name(device),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "parts": [],
    }
    for part in parts:
        row = {"name": part.name, "status": "running", "seconds": 0.0}
        found["parts"].append(row)
        say(f"{part.name} (at most {part.limit:.0f} s) ...")
        started = time.monotonic()
        with (folder / f"{part.name}.log").open("w") as log:
            process = subprocess.Popen(part.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None and time.monotonic() - started < part.limit:
            time.sleep(_LOOK_SECONDS)
            _write(found, row, part, time.monotonic() - started, folder)
        row["status"] = {None: "ended after its limit", 0: "done"}.get(process.poll(), "failed")
        _end(process)
        _write(found, row, part, time.monotonic() - started, folder)
        say(f"{part.name}: {row['status']}, {row['seconds']:.0f} s")
    return found


def _write(found: dict[str, Any], row: dict[str, Any], part: Part, seconds: float, folder: Path) -> None:
    row.update(part.read(), seconds=round(seconds, 1))
    storage.write_bytes(str(folder / "gpu.json"), json.dumps(found, indent=1).encode())
    storage.write_bytes(str(folder / "gpu.md"), markdown(found).encode())


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a part and the processes that it started in its session."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def read_tests(log: Path) -> dict[str, Any]:
    """Return counts of tests by outcome from pytest's log (`-v`), and the names of those that failed."""
    if not log.exists():
        return {}
    outcomes = dict(_TEST.findall(log.read_text(errors="replace")))
    counts = {name: list(outcomes.values()).count(name.upper()) for name in ("passed", "failed", "skipped", "error")}
    bad = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    return {"tests": counts, "not passed": bad}


def read_measurements(file: Path) -> dict[str, Any]:
    """Return the lines of a benchmark's file, with their share of the matrix product's pace."""
    text = file.read_bytes() if file.exists() else b""
    if not text:
        return {}
    measured = Measurements.from_json(text)
    return {
        "preset": measured.preset,
        "encoder": measured.encoder,
        "precision": measured.precision,
        "matmul TFLOP/s": round(measured.matmul_flops / 1e12, 2),
        "lines": [_line(timing, measured.matmul_flops) for timing in measured.timings],
        "costs": measured.costs,
    }


def _line(timing: Timing, matmul: float) -> dict[str, Any]:
    return {
        "what": timing.stage,
        "per second": round(timing.items / timing.seconds, 3),
        "unit": timing.unit,
        "model FLOP utilisation": round(timing.flops / timing.seconds / matmul, 4) if timing.flops else None,
        "by the bound": round(timing.ratio, 3),
        "bound": timing.bound_is,
        "peak GiB": round(timing.peak_bytes / 2**30, 2),
        **timing.details,
    }


def read_run(folder: Path) -> dict[str, Any]:
    """Return scores and seconds of a run from its `metrics.json`."""
    file = folder / "metrics.json"
    if not file.exists():
        return {}
    metrics = json.loads(file.read_text())
    seconds = {stage: row["seconds"] for stage, row in metrics["stages"].items()}
    return {"mean_iou": metrics["mean_iou"], "pixel_accuracy": metrics["pixel_accuracy"], "stages [s]": seconds}


def measure_arithmetic(device: torch.device, file: Path) -> None:
    """Time encoder, maps, training step, counting and K-Means in this process, without Ray; write line by line.

    The most important figures come first: a training step of COCO-Stuff's global batch in both precisions.
    """
    small = device.type == "cpu"
    batch, repeats, rows = (4, 2, 3000) if small else (256, 5, 500_000)
    recipes = {name: preset(name).with_fields(_fields(device)) for name in ("coco-stuff-27", "coco-stuff-171")}
    recipe = recipes["coco-stuff-27"]
    bare = Bare(recipe)
    about = bare.about()
    timings: list[Timing] = []

    def keep(timing: Timing, what: str) -> None:
        timings.append(replace(timing, stage=what))
        found = Measurements(
            preset=recipe.preset, encoder=recipe.encoder.name, timings=tuple(timings), costs={}, **about
        )
        storage.write_bytes(str(file), found.to_json().encode())

    keep(bare.training_step(batch, repeats), f"training step, {batch} views, K = 27")
    keep(bare.forward_pace(batch, repeats), "encoder forward, evaluation's size")
    keep(bare.concept_maps(repeats), "concept maps, K = 27")
    keep(bare.counting_pace(batch, repeats), "counting, a batch at a time")
    exact = recipe.with_fields({"training.precision": "float32", "encoder.precision": "float32"})
    keep(Bare(exact).training_step(batch, repeats), f"training step, {batch} views, K = 27, float32")
    more = Bare(recipes["coco-stuff-171"])
    keep(more.training_step(batch, repeats), f"training step, {batch} views, K = 171")
    keep(more.concept_maps(repeats), "concept maps, K = 171")
    keep(bare.concepts(rows, 5 if small else 20, 2), "K-Means, one worker")
    if not small:
        large = Bare(recipe.with_fields({"encoder.name": "vit_base_patch8_224.dino"}))
        keep(large.training_step(batch, repeats), f"training step, {batch} views, K = 27, ViT-B/8")
        keep(large.forward_pace(batch, repeats), "encoder forward, evaluation's size, ViT-B/8")


def _fields(device: torch.device) -> dict[str, Any]:
    return {"encoder.weights": "random" if device.type == "cuda" else "pretrained", **benchmark_fields(device)}


def recipe_flags(device: torch.device) -> list[str]:
    """Return :func:`benchmark_fields` as flags of a job."""
    flags = []
    for name, value in benchmark_fields(device).items():
        text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags += [f"--{name}", text]
    return flags


def markdown(found: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"# {found['device']}",
        "",
        f"{found['date']}, torch {found['torch']}, CUDA {found['cuda'] or 'none'}. Made by `make gpu`.",
    ]
    for part in found["parts"]:
        lines += ["", f"## {part['name']}: {part['status']}, {part['seconds']:.0f} s", ""]
        if "tests" in part:
            lines.append(", ".join(f"{count} {outcome}" for outcome, count in part["tests"].items()))
            lines += [f"- not passed: `{name}`" for name in part["not passed"]]
        if "lines" in part:
            lines += _table(part)
        if "stages [s]" in part:
            lines.append(f"mIoU {part['mean_iou']:.2f}, pixel accuracy {part['pixel_accuracy']:.2f}.")
            lines.append(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in part["stages [s]"].items()) + ".")
    return "\n".join(lines) + "\n"


def _table(part: dict[str, Any]) -> list[str]:
    lines = [
        f"{part['encoder']}, {part['precision']}; a large matrix product reaches {part['matmul TFLOP/s']} TFLOP/s; "
        "model FLOP utilisation is a share of this.",
        "",
        "| what | per second | model FLOP utilisation | ours / bound | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in part["lines"]:
        share = line["model FLOP utilisation"]
        lines.append(
            f"| {line['what']} | {line['per second']:,.1f} {line['unit']} | {'' if share is None else f'{share:.0%}'} "
            f"| {line['by the bound']:.2f} ({line['bound']}) | {line['peak GiB']:.1f} GiB |"
        )
    return lines
