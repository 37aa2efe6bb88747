"""Store timings of a stage and of its lower bound, which take turns, and print the table of medians.

This module does not import torch, so that planning from a file of measurements is fast.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transfgu.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One line of the table."""

    stage: str
    bound_is: str
    """Description of the bound."""
    items: int
    unit: str
    """Unit of `items`: images, or rows times iterations."""
    ours: tuple[float, ...]
    """Seconds of each turn."""
    bound: tuple[float, ...]
    """Seconds of each turn."""
    peak_bytes: int
    """Peak memory of the process that does the work; with a GPU, memory of the GPU."""
    flops: float = 0.0
    """Floating-point operations of the bound; 0 if the bound is not made of them."""
    details: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Median seconds of ours."""
        return statistics.median(self.ours)

    @property
    def ratio(self) -> float:
        """Median seconds of ours divided by the median of the bound."""
        return self.seconds / statistics.median(self.bound)


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """Measurements of `transfgu benchmark ingest`: how training reads images, in the first epoch and later."""

    samples_per_second_per_core: float
    first_epoch_requests_per_sample: float
    requests_per_sample: float
    bytes_per_sample: float
    """Bytes from the storage after the first epoch."""
    where: str = "measured"
    """The file of the measurements."""

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Ingest":
        """Parse JSON text; raise UserError unless the benchmark of ingest wrote it."""
        try:
            tree = json.loads(text)
            names = [f.name for f in fields(cls) if f.name != "where"]
            found = cls(**{name: float(tree[name]) for name in names}, where=f"from the node's cache ({where})")
            if found.samples_per_second_per_core <= 0:
                raise ValueError
            return found
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise UserError(
                f"{where} is not a measurement of ingest: write one by transfgu benchmark ingest --out",
                code="measurements-damaged",
            ) from None


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Measurements of one run of the benchmark."""

    preset: str
    encoder: str
    device: str
    precision: str
    date: str
    cores: int
    matmul_flops: float
    """Floating-point operations per second of a large matrix product in the same precision."""
    timings: tuple[Timing, ...]
    costs: dict[str, float]
    """Costs of reading and storing an image: see `transfgu.benchmarks.stages`."""

    def to_json(self) -> str:
        """Return JSON text; :meth:`from_json` reads it."""
        tree = asdict(self)
        for row, timing in zip(tree["timings"], self.timings, strict=True):
            row["ratio"] = timing.ratio
        return json.dumps(tree, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Measurements":
        """Parse JSON text; raise UserError unless :meth:`to_json` wrote it."""
        try:
            tree = json.loads(text)
            names = {f.name for f in fields(Timing)}
            timings = []
            for row in tree["timings"]:
                values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
                timings.append(Timing(**{k: v for k, v in values.items() if k in names}))
            return cls(**{**tree, "timings": tuple(timings)})
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise UserError(
                "this is not a file of measurements: write one by transfgu benchmark --out", code="measurements-damaged"
            ) from None

    def timing(self, stage: str) -> Timing:
        """Return the line of a stage; raise UserError if it was not measured."""
        for timing in self.timings:
            if timing.stage == stage:
                return timing
        raise UserError(f"{stage} was not measured: run transfgu benchmark all", code="measurements-missing")

    def table(self) -> str:
        """Return a table: stage, ours, bound, ratio, peak memory, and the share of the matrix product's speed."""
        head = ["stage", "ours", "bound", "ratio", "peak memory", "of matmul peak", "the bound is"]
        rows = [
            [
                t.stage,
                f"{t.seconds:.3f} s",
                f"{statistics.median(t.bound):.3f} s",
                f"{t.ratio:.3f}",
                f"{t.peak_bytes / 2**30:.2f} GiB",
                f"{t.flops / t.seconds / self.matmul_flops:.0%}" if t.flops else "",
                f"{t.bound_is} ({t.items} {t.unit})",
            ]
            for t in self.timings
        ]
        notes = [f"{t.stage}: {name} {value:.4g}" for t in self.timings for name, value in t.details.items()]
        about = (
            f"{self.preset}, {self.encoder}, {self.precision}, {self.device}, "
            f"matmul peak {self.matmul_flops / 1e12:.3g} TFLOP/s, {self.date}"
        )
        return "\n".join([about, *aligned([head, *rows]), *notes])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first and last columns are text and whose other columns are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def in_turns(
    ours: Callable[[], float], bound: Callable[[], float], repeats: int, *, warm: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Time two functions in turns; returns their seconds. Unless `warm`, the first turn does not count."""
    turns = [(ours(), bound()) for _ in range(repeats + (not warm))][-repeats:]
    first, second = zip(*turns, strict=True)
    return first, second
