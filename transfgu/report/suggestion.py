"""How many concepts do a run's features hold? Measures for a range of K, a picture of them, and a suggestion."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float32, Int
from markupsafe import Markup
from numpy import ndarray

from transfgu import formats
from transfgu.cluster_numbers import Measures, elbow, measure, suggested
from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.report import charts
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Run

PICTURE = "suggestion.svg"
TABLE = "suggestion.json"

_FEW = 10  # windows per cluster at least, in half of the images
_WIDTH, _HEIGHT, _HEAD = 440, 240, 34
_STYLE = (
    "svg{background:#fff}.chart .grid,.chart .mark{stroke:#d5dae0}.chart .mark{stroke-dasharray:1 4;stroke:#57606a}"
    ".chart .chosen{stroke:#b35900}.chart text,.head{font:12px system-ui,'DejaVu Sans',sans-serif;fill:#57606a}"
    ".head{font-size:14px;font-weight:600;fill:#1b1f24}.chart .line{fill:none;stroke-width:2;stroke:#0b5cad}"
    ".chart .dot{fill:#0b5cad}.chart .name{font-weight:600;fill:#0b5cad}"
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured of the windows that are clustered together.

    Args:
        name: "things", "stuff", or "concepts" for both in one.
        windows: how many were measured.
        present: the run's own number of clusters.
        measures: by K, ascending.
    """

    name: str
    windows: int
    present: int
    measures: tuple[Measures, ...]

    @property
    def suggestion(self) -> int:
        """The K that is suggested."""
        return suggested(self.measures)

    @property
    def flag(self) -> str:
        """The flag of `transfgu train` that sets this K."""
        return "--things" if self.name == "concepts" else f"--{self.name}"


def find(
    recipe: Recipe,
    run: Run,
    ks: Sequence[int],
    *,
    windows: int,
    seed: int = 0,
    after: Callable[[int, int], None] | None = None,
) -> list[Found]:
    """Measure a range of K on a run's features.

    Args:
        recipe: the run's.
        run: with features.
        ks: numbers of clusters, ascending, each 2 at least.
        windows: of each group at most; of larger runs whole images are drawn.
        seed: of the draw, the divisions and K-Means.
        after: called with the number of K that are done, and of those in all.

    Raises:
        UserError: the run has no features, or too few windows for these K.
    """
    if run.artifact("features").manifest() is None:
        raise UserError(
            f"{storage.shown(run.uri)} has no features yet: compute them by transfgu train with --until features",
            code="features-missing",
        )
    things, stuff = recipe.concepts.things, recipe.concepts.stuff
    groups = [("things", "foreground", things), ("stuff", "background", stuff)]
    if recipe.windows.groups == "all":
        groups = [("concepts", "all", things + stuff)]
    groups = [group for group in groups if group[2]]
    found = []
    for name, kind, present in groups:
        rows, images = _features(run, kind, windows, seed)
        most = len(rows) // (2 * _FEW)
        fitting = [k for k in ks if k <= most]
        if not fitting:
            raise UserError(
                f"{len(rows)} {kind} windows are too few to compare {ks[0]} to {ks[-1]} clusters: use more images",
                code="windows-few",
            )
        before, whiten = len(found) * len(ks), recipe.concepts.whitens(kind)
        tell = after and (lambda done, b=before: after(b + done, len(groups) * len(ks)))
        measures = measure(rows, images, fitting, whiten=whiten, seed=seed, after=tell)
        found.append(Found(name=name, windows=len(rows), present=present, measures=tuple(measures)))
    return found


def _features(run: Run, kind: str, windows: int, seed: int) -> tuple[Float32[ndarray, "n d"], Int[ndarray, " n"]]:
    """Features of one kind of windows, and their images' numbers: all, or those of images drawn at random."""
    parts = [uri for uri in storage.list_files(run.artifact("features").uri) if uri.endswith(".parquet")]
    counted: dict[int, int] = {}
    for part in parts:
        table = parquet.read(part, ["index", "group"])
        table = table if kind == "all" else table.filter(pc.equal(table["group"].cast("string"), kind))
        for pair in table["index"].value_counts():
            counted[pair["values"].as_py()] = pair["counts"].as_py()
    order = np.random.default_rng(seed).permutation(np.array(sorted(counted), np.int64))
    reach = np.cumsum([counted[int(image)] for image in order])
    drawn = np.sort(order[: int(np.searchsorted(reach, windows, side="right"))]) if len(order) else order
    features, images = [np.empty((0, 1), np.float32)], [np.empty(0, np.int64)]
    for part in parts:
        table = parquet.read(part, ["index", "group", "feature"])
        kept = np.isin(table["index"].to_numpy(), drawn)
        if kind != "all":
            kept &= pc.equal(table["group"].cast("string"), kind).to_numpy()
        if not kept.any():
            continue
        column = table["feature"].combine_chunks()
        width = column.type.list_size
        features.append(column.flatten().to_numpy().reshape(-1, width)[kept])
        images.append(table["index"].to_numpy()[kept].astype(np.int64))
    return np.concatenate(features[1:] or features), np.concatenate(images)


def write(run: Run, found: Sequence[Found]) -> str:
    """Write the picture and the table into the run's folder; returns the picture's URI."""
    tree = {
        group.name: {
            "windows": group.windows,
            "present": group.present,
            "suggestion": group.suggestion,
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
        head = f"{group.name}: {group.suggestion} suggested, {group.present} in the run"
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
        lines.append(f"{group.name}: {group.windows} windows, {group.present} clusters in the run")
        lines.append("   K  stability         silhouette  inertia")
        for m in group.measures:
            note = "  <- suggested" if m.k == group.suggestion else ""
            lines.append(f"{m.k:4}  {m.stability:.3f} +- {m.spread:.3f}  {m.silhouette:10.3f}  {m.inertia:7.4f}{note}")
    return "\n".join(lines)
