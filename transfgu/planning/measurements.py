"""Store timings of a stage and of its lower bound, which take turns, and print the table of medians.

This module does not import torch, so that a plan from a file of measurements is quick.
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
    """What the bare bound does."""
    items: int
    unit: str
    """What the items are: images, or rows times iterations."""
    ours: tuple[float, ...]
    """Seconds of each turn."""
    bound: tuple[float, ...]
    """Seconds of each turn."""
    peak_bytes: int
    """The most memory that the process which does the work held: of the device, where it is a GPU."""
    flops: float = 0.0
    """Floating-point operations of the bound; 0 where they are not what it is made of."""
    details: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of ours, the median."""
        return statistics.median(self.ours)

    @property
    def ratio(self) -> float:
        """Ours by the bound, medians."""
        return self.seconds / statistics.median(self.bound)


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """What `transfgu benchmark ingest` measured: training's reading, after and in the first epoch."""

    samples_per_second_per_core: float
    first_epoch_requests_per_sample: float
    requests_per_sample: float
    bytes_per_sample: float
    """Bytes from the store after the first epoch."""
    where: str = "measured"
    """The file that says so."""

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Ingest":
        """Raises UserError where the text is none of the ingest benchmark's."""
        try:
            tree = json.loads(text)
            names = [f.name for f in fields(cls) if f.name != "where"]
            found = cls(**{name: float(tree[name]) for name in names}, where=f"from the node's cache ({where})")
            if found.samples_per_second_per_core <= 0:
                raise ValueError
            return found
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise UserError(
                f"{where} is no file of the ingest's measurement: transfgu benchmark ingest --out writes one",
                code="measurements-damaged",
            ) from None


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What one run of the benchmark found."""

    preset: str
    encoder: str
    device: str
    precision: str
    date: str
    cores: int
    matmul_flops: float
    """Floating-point operations a second of a large matrix product at that precision."""
    timings: tuple[Timing, ...]
    costs: dict[str, float]
    """What reading and keeping an image takes: see `transfgu.benchmarks.stages`."""

    def to_json(self) -> str:
        """As JSON text; :meth:`from_json` reads it back."""
        tree = asdict(self)
        for row, timing in zip(tree["timings"], self.timings, strict=True):
            row["ratio"] = timing.ratio
        return json.dumps(tree, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Measurements":
        """Raises UserError where the text is none of :meth:`to_json`."""
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
                "this is no file of measurements: transfgu benchmark writes them", code="measurements-damaged"
            ) from None

    def timing(self, stage: str) -> Timing:
        """The line of a stage; UserError where it was not measured."""
        for timing in self.timings:
            if timing.stage == stage:
                return timing
        raise UserError(f"{stage} was not measured: run transfgu benchmark all", code="measurements-missing")

    def table(self) -> str:
        """For people: stage, ours, bound, ratio, peak memory, and how much of the matrix product's speed is reached."""
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
    """Lines of a table whose first and last columns are text and the others numbers."""
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
    """Seconds that each of the two says it took, in turns; after one that does not count, unless each is `warm`."""
    turns = [(ours(), bound()) for _ in range(repeats + (not warm))][-repeats:]
    first, second = zip(*turns, strict=True)
    return first, second
