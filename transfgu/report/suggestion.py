"""Suggest a number of concepts from a run's features: measures for a range of K, a picture, a table.

The measures are those of `transfgu.cluster_numbers`, separately for foreground and background windows, as these are
clustered.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int
from markupsafe import Markup
from numpy import ndarray

from transfgu import formats
from transfgu.cluster_numbers import Measures, as_stable, drawn_images, elbow, measure, suggested
from transfgu.errors import UserError, counted
from transfgu.inference.shards import matrix
from transfgu.recipe import SUGGESTION_WINDOWS, Recipe
from transfgu.report import charts
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Run

PICTURE = "suggestion.svg"
TABLE = "suggestion.json"

_FEW = 10  # minimum number of windows per cluster in half of the images
_CLEAR = 0.8  # stability above which a suggestion is not called a guess
_WIDTH, _HEIGHT, _HEAD = 440, 240, 34
_STYLE = (
    "svg{background:#fff}.chart .grid,.chart .mark{stroke:#d5dae0}.chart .mark{stroke-dasharray:1 4;stroke:#57606a}"
    ".chart .chosen{stroke:#b35900}.chart text,.head{font:12px system-ui,'DejaVu Sans',sans-serif;fill:#57606a}"
    ".head{font-size:14px;font-weight:600;fill:#1b1f24}.chart .line{fill:none;stroke-width:2;stroke:#0b5cad}"
    ".chart .dot{fill:#0b5cad}.chart .name{font-weight:600;fill:#0b5cad}"
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Measures of the windows that are clustered together.

    Args:
        name: "things", "stuff", or "concepts" for both together.
        windows: number of measured windows.
        present: the run's own number of clusters.
        measures: by K, ascending.
    """

    name: str
    windows: int
    present: int
    measures: tuple[Measures, ...]

    @property
    def suggestion(self) -> int:
        """The suggested K."""
        return suggested(self.measures)

    @property
    def chosen(self) -> Measures:
        """The measures of that K."""
        return next(m for m in self.measures if m.k == self.suggestion)

    @property
    def as_stable(self) -> list[int]:
        """All K that are as stable as the most stable one."""
        return as_stable(self.measures)

    @property
    def flag(self) -> str:
        """The flag of `transfgu train` that sets this K."""
        return "--things" if self.name == "concepts" else f"--{self.name}"


def numbers(least: int, most: int) -> list[int]:
    """Return the numbers from `least` to `most` to measure: all up to 32, then 16 per doubling."""
    found = [least]
    while (following := found[-1] + max(1, found[-1] // 16)) <= most:
        found.append(following)
    return found


def find(
    recipe: Recipe,
    run: Run,
    *,
    least: int = 2,
    most: int = 0,
    windows: int = SUGGESTION_WINDOWS,
    seed: int = 0,
    after: Callable[[int, int], None] | None = None,
) -> list[Found]:
    """Measure a range of K on a run's features.

    Args:
        recipe: recipe of the run.
        run: a run with features.
        least: the smallest K, at least 2.
        most: the largest K; 0: twice the run's own, at least 12.
        windows: maximum number of measured windows per group; if there are more, whole images are drawn.
        seed: seed of the draw, the divisions and K-Means.
        after: called with the number of finished K, and their total.

    Raises:
        UserError: the run has no features, or too few windows for these K.
    """
    if run.artifact("features").manifest() is None:
        raise UserError(
            f"{storage.shown(run.uri)} has no features yet: compute them with transfgu train --until features",
            code="features-missing",
        )
    things, stuff = recipe.concepts.things, recipe.concepts.stuff
    groups = [("things", "foreground", things), ("stuff", "background", stuff)]
    if recipe.windows.groups == "all":
        groups = [("concepts", "all", things + stuff)]
    drawn = [
        (name, present, kind, *_features(run, kind, windows, seed), numbers(least, most or max(12, 2 * present)))
        for name, kind, present in groups
        if present
    ]
    for *_, kind, rows, _, ks in drawn:
        if ks[-1] > len(rows) // (2 * _FEW):
            kinds = "windows" if kind == "all" else f"{kind} windows"
            raise UserError(
                f"{len(rows)} {kinds} are too few to compare up to {ks[-1]} clusters: use more images, or "
                f"--most {max(least, len(rows) // (2 * _FEW))}",
                code="windows-few",
            )
    total, done, found = sum(len(ks) for *_, ks in drawn), 0, []
    for name, present, kind, rows, images, ks in drawn:
        whiten = recipe.concepts.whitens(kind)
        measures = measure(
            rows, images, ks, whiten=whiten, seed=seed, after=after and (lambda n, d=done: after(d + n, total))
        )
        found.append(Found(name=name, windows=len(rows), present=present, measures=tuple(measures)))
        done += len(ks)
    return found


def _features(run: Run, kind: str, windows: int, seed: int) -> tuple[Float32[ndarray, "n d"], Int[ndarray, " n"]]:
    """Return the features of one kind of windows, and their images' numbers: all, or those of randomly drawn images."""
    parts = [uri for uri in storage.list_files(run.artifact("features").uri) if uri.endswith(".parquet")]
    indices = []
    for part in parts:
        table = parquet.read(part, ["index", "group"])
        indices.append(table["index"].to_numpy()[_of_kind(table, kind)])
    drawn = drawn_images(np.concatenate(indices), windows, seed)
    features, images = [], []
    for part in parts:
        table = parquet.read(part, ["index", "group", "feature"])
        kept = _of_kind(table, kind) & np.isin(table["index"].to_numpy(), drawn)
        features.append(matrix(table["feature"])[kept])
        images.append(table["index"].to_numpy()[kept].astype(np.int64))
    return np.concatenate(features), np.concatenate(images)


def _of_kind(table: pa.Table, kind: str) -> Bool[ndarray, " n"]:
    found: ndarray = pc.equal(table["group"].cast("string"), kind).to_numpy()
    return found


def write(run: Run, found: Sequence[Found]) -> str:
    """Write the picture and the table into the run's folder; returns the picture's URI."""
    tree = {
        group.name: {
            "windows": group.windows,
            "present": group.present,
            "suggestion": group.suggestion,
            "as_stable": group.as_stable,
            "elbow": elbow(group.measures),
            "measures": [asdict(m) for m in group.measures],
        }
        for group in found
    }
    storage.write_bytes(run.file(TABLE), json.dumps(formats.stamp(tree), indent=1).encode())
    storage.write_bytes(run.file(PICTURE), picture(found).encode())
    return run.file(PICTURE)


def picture(found: Sequence[Found]) -> str:
    """Return an SVG of three charts for each kind of windows: stability, silhouette and inertia by K."""
    columns = {"stability": "stability (adjusted Rand index of halves)", "silhouette": "silhouette",
               "inertia": "inertia (mean squared distance)"}  # fmt: skip
    parts = [
        Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}"><style>{}</style>').format(
            _WIDTH * len(columns), (_HEIGHT + _HEAD) * len(found), Markup(_STYLE)
        )
    ]
    for row, group in enumerate(found):
        top, ks = row * (_HEIGHT + _HEAD), [m.k for m in group.measures]
        head = f"{group.name}: {group.suggestion} suggested (solid line), {group.present} in the run (dotted)"
        for column, (name, title) in enumerate(columns.items()):
            points = [(float(m.k), float(getattr(m, name))) for m in group.measures]
            chart = charts.line_chart(
                f"{group.name}: {title}",
                [charts.Series(name=name, points=points)],
                x_label=f"{title}, by K",
                x_range=(float(ks[0]), float(ks[-1])),
                marks=[float(group.present)] if ks[0] <= group.present <= ks[-1] else [],
                chosen=float(group.suggestion),
            )
            place = f'<svg x="{column * _WIDTH}" y="{top + _HEAD}" width="{_WIDTH}" height="{_HEIGHT}" '
            parts.append(Markup(str(chart).replace("<svg ", place, 1)))
        parts.append(Markup('<text class="head" x="10" y="{}">{}</text>').format(top + 22, head))
    return Markup("").join([*parts, Markup("</svg>")])


def table(found: Sequence[Found]) -> str:
    """Return the measures as lines of text."""
    lines = []
    for group in found:
        lines.append(
            f"{group.name}: {counted(group.windows, 'window')}, {counted(group.present, 'cluster')} in the run"
        )
        lines.append("   K  stability         silhouette  inertia")
        for m in group.measures:
            note = "  <- suggested" if m.k == group.suggestion else ""
            lines.append(f"{m.k:4}  {m.stability:.3f} +- {m.spread:.3f}  {m.silhouette:10.3f}  {m.inertia:7.4f}{note}")
        lines.append(verdict(group))
    return "\n".join(lines)


def verdict(group: Found) -> str:
    """Return one line about how clear the suggestion is."""
    stable, chosen = group.as_stable, group.chosen
    if chosen.stability >= _CLEAR:
        how = "halves of the images find the same clusters"
    else:
        how = "halves of the images agree only in part: this is a first guess"
    others = ", ".join(str(k) for k in stable[1:])
    return f"{group.name}: {group.suggestion} suggested; {how}{f'; as stable: {others}' if others else ''}"
