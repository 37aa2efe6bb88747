"""Write the report of a run: its figures and pictures in one HTML file.

The report is made from the run's artefacts only, so it can be written again at any time. It loads nothing from
elsewhere: pictures are embedded, charts are SVG, and the page is complete without its short script.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import jinja2
import numpy as np
import pyarrow as pa
import safetensors.numpy
import torch
from jaxtyping import Float, Int, Int16
from markupsafe import Markup

from transfgu import datasets
from transfgu.datasets import images, map_files, pictures
from transfgu.datasets.packed_maps import unpack_maps
from transfgu.errors import BadInput
from transfgu.maps import background_map, scale_maps
from transfgu.methods import method
from transfgu.metrics import scores
from transfgu.recipe import FIELDS, Recipe, preset
from transfgu.report import charts
from transfgu.report.charts import Series
from transfgu.report.published import TABLE_1, Result
from transfgu.segmenter import Segmenter
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Manifest, Run
from transfgu.training.checkpoints import merit

S = TypeVar("S")
T = TypeVar("T")

_SHOWN = 12  # images in the grid
_MAPS_SHOWN = 4  # images whose pseudo labels are shown
_SIDE = 320  # px, a picture's longer side
_TILE = 72  # px, a window's side
_READERS = 8  # images read at a time
_TABLE_CLASSES = 32  # up to this many classes the confusion matrix is a table, above a picture
_BARS = 12  # best and worst classes shown, if there are more than twice as many classes
_FREE = ("data", "seed", "encoder.batch_size", "evaluation.batch_size")  # fields that don't change a benchmark
_NAMED = 10  # names of left-out inputs shown per reason


def write(recipe: Recipe, run: Run, stages: Mapping[str, Manifest], metrics: Mapping[str, Any]) -> str:
    """Write `report.html` into the run's folder.

    Args:
        recipe: the resolved recipe of the run.
        run: a run whose evaluation is complete.
        stages: manifests of the stages, in order.
        metrics: the content of `metrics.json`.

    Returns:
        The report's URI.

    Raises:
        UserError: an artefact is missing or can't be read.
    """
    uri = run.file("report.html")
    storage.write_bytes(uri, render(recipe, run, stages, metrics).encode())
    return uri


def render(recipe: Recipe, run: Run, stages: Mapping[str, Manifest], metrics: Mapping[str, Any]) -> str:
    """Return the report as HTML; arguments as in :func:`write`."""
    confusion = _confusion(run)
    # Ground truth has the classes of the labels, so if clusters were merged, predictions are shown without the
    # merges.
    segmenter = Segmenter.load(run.uri, named=confusion is None or not metrics.get("named"))
    grid = _grid(recipe, run, segmenter)
    times = _times(stages, metrics)
    changes = _changes(recipe)
    kept = _kept(run, metrics)
    return template("report.html").render(
        recipe=recipe,
        metrics=metrics,
        labelled=confusion is not None,
        facts=_facts(recipe, stages),
        table=_table_1(recipe, metrics),
        grid=grid,
        legend=_legend(segmenter, [p for row in grid for p in row.pictures]),
        classes=None if confusion is None else class_bars(segmenter, confusion),
        confusion=None if confusion is None else confusion_view(segmenter, confusion),
        method=method(recipe.method),
        concepts=concept_views(recipe, run, segmenter) if "concepts" in recipe.stages else [],
        pseudo_labels=_pseudo_labels(recipe, run, segmenter) if "concepts" in recipe.stages else [],
        curves=_curves(run, kept),
        epochs=_epochs(run, metrics),
        protocol=_PROTOCOLS[recipe.evaluation.protocol].format(*recipe.dataset.image_size),
        kept=kept,
        made=metrics.get("made"),
        commands=_commands(recipe, run),
        scale=pictures.png(pictures.colour_scale(160, 12)),
        times=times,
        slowest=max(times, key=lambda time: time.seconds),
        total_seconds=sum(time.seconds for time in times),
        left_out=_left_out(stages),
        changes=changes,
        departures=[c["name"] for c in changes if c["name"] not in _FREE],
        yaml=recipe.to_yaml(),
        titles=_TITLES,
    )


@cache
def template(name: str) -> jinja2.Template:
    """Return a page of `templates/`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("transfgu.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["number"] = lambda n: f"{n:,}".replace(",", "\u202f")
    return environment.get_template(name)


_NO_LOSS = (
    "seconds",
    "start_seconds",
    "score_seconds",
    "images_per_second",
    "label_free",
)  # entries of the history that are not drawn

_TITLES = {
    "samples": "Samples",
    "features": "Features",
    "concepts": "Concepts",
    "pseudo_labels": "Pseudo labels",
    "training": "Training",
    "evaluation": "Evaluation",
}


_PROTOCOLS = {
    "published": "as published: image and label at {} x {} pixels",
    "label": "at the label's own resolution: the image at {} x {} pixels, its prediction enlarged to the label's size",
    "stego": "as STEGO and later work do: image and label resized to cover {} x {} pixels, and their centre cropped",
}


def duration(seconds: float) -> str:
    """Return a duration as text, such as ``3 min 20 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# The sections of the page, one function per section.


def _facts(recipe: Recipe, stages: Mapping[str, Manifest]) -> dict[str, Any]:
    """Return the numbers that the description of the method contains."""
    images_of = {stage: manifest.outcome.items for stage, manifest in stages.items()}
    windows = sum(stages["features"].outcome.details["windows"].values()) if "features" in stages else 0
    return {"items": images_of, "windows": windows}


def _table_1(recipe: Recipe, metrics: Mapping[str, Any]) -> list[tuple[Result, bool]]:
    """Return the published results on this benchmark together with this run's; True marks the row of this run."""
    if recipe.preset not in TABLE_1 or metrics["mean_iou"] is None:
        return []
    ours = Result("this run", metrics["mean_iou"], metrics["pixel_accuracy"])
    return [*((result, False) for result in TABLE_1[recipe.preset]), (ours, True)]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the page: its data URI, its text for screen readers, its title, and the class numbers in it."""

    src: str
    alt: str
    title: str
    keys: Sequence[pictures.Key] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of pictures: an image with its prediction, label or maps."""

    name: str
    pictures: Sequence[Picture]


def _grid(recipe: Recipe, run: Run, segmenter: Segmenter) -> list[Row]:
    """Return rows of image, prediction and, if there are labels, ground truth and errors."""
    table = _samples(run, "validation")
    if recipe.dataset.curated:
        table = table.filter(table["curated"])
    known = datasets.classes(recipe)

    def read(sample: dict[str, Any]) -> tuple[dict[str, Any], pictures.Pixels, pictures.Mask | None]:
        image = images.read_image(sample["image"], orient=recipe.dataset.orient, max_pixels=recipe.dataset.max_pixels)
        label = None if sample["label"] is None else images.read_label(sample["label"], known, image.shape[:2])
        return sample, image, label

    rows = []
    for sample, image, label in _readable(read, spread(table, _SHOWN)):
        prediction = segmenter.predict(image)
        shown = [photo(image, sample["name"]), _mask(prediction, segmenter, "prediction")]
        if label is not None:
            shown.append(_mask(label, segmenter, "ground truth"))
            shown.append(_errors(image, prediction, label))
        rows.append(Row(name=sample["name"], pictures=shown))
    return rows


def _errors(image: pictures.Pixels, prediction: pictures.Mask, label: pictures.Mask) -> Picture:
    """Return the picture of the pixels at which a prediction is wrong."""
    labelled = label >= 0
    wrong = 100 * float((labelled & (prediction != label)).sum()) / max(1, int(labelled.sum()))
    painted = pictures.error_map(image, prediction, label)
    return Picture(
        src=pictures.jpeg(pictures.shrink(painted, _SIDE)),
        alt=f"errors: {wrong:.0f} % of the labelled pixels are wrong",
        title=f"errors, {wrong:.0f} %",
    )


def photo(image: pictures.Pixels, name: str, side: int = _SIDE) -> Picture:
    """Return the picture of an image of the data set, with a longer side of at most `side` pixels."""
    return Picture(src=pictures.jpeg(pictures.shrink(image, side)), alt=f"image {name}", title="image")


def _mask(mask: pictures.Mask, segmenter: Segmenter, title: str) -> Picture:
    return mask_picture(mask, segmenter.colours, segmenter.classes, title)


def mask_picture(
    mask: pictures.Mask, colours: Sequence[pictures.Colour], names: Sequence[str], title: str, side: int = _SIDE
) -> Picture:
    """Return the picture of a mask, with a longer side of `side` pixels and the colours and numbers of its classes."""
    return Picture(
        src=pictures.png(pictures.paint(mask, colours, side)),
        alt=f"{title}: {pictures.describe(mask, names)}",
        title=title,
        keys=pictures.keys(mask),
    )


@dataclass(frozen=True, kw_only=True)
class ClassKey:
    """A class in a legend."""

    number: int
    name: str
    background: str
    """Its colour, as a value of CSS's `background`."""


def class_key(segmenter: Segmenter, number: int) -> ClassKey:
    """Return the legend's entry for a class of a model."""
    return ClassKey(number=number, name=segmenter.classes[number], background=pictures.css(segmenter.colours[number]))


def _legend(segmenter: Segmenter, shown: Iterable[Picture]) -> list[ClassKey]:
    """Return the classes whose numbers are drawn in at least one picture."""
    return [class_key(segmenter, n) for n in sorted({key.number for picture in shown for key in picture.keys})]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Scores of a class and its share of the labelled pixels, in percent, with the cluster that it was matched to."""

    key: ClassKey
    iou: float
    precision: float
    recall: float
    share: float
    cluster: int


def class_bars(segmenter: Segmenter, confusion: Int[np.ndarray, "C clusters"]) -> dict[str, list[Bar]]:
    """Return the classes from best to worst; if there are many, the best, the worst and the others separately."""
    found = scores(confusion)
    iou, clusters = found.iou, found.clusters
    hits = confusion[np.arange(len(confusion)), clusters]
    share = 100 * confusion.sum(axis=1) / confusion.sum()
    recall = 100 * hits / np.maximum(confusion.sum(axis=1), 1)
    precision = 100 * hits / np.maximum(confusion.sum(axis=0)[clusters], 1)
    bars = [
        Bar(
            key=class_key(segmenter, c),
            iou=float(iou[c]),
            precision=float(precision[c]),
            recall=float(recall[c]),
            share=float(share[c]),
            cluster=int(clusters[c]),
        )
        for c in np.argsort(-iou, kind="stable").tolist()
        if not np.isnan(iou[c])
    ]
    if len(bars) <= 2 * _BARS + 4:
        return {"best": bars, "between": [], "worst": []}
    return {"best": bars[:_BARS], "between": bars[_BARS:-_BARS], "worst": bars[-_BARS:]}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the confusion matrix: percent of the true class's pixels, as text and as a step (0 to 10)."""

    text: str
    level: int


def confusion_view(segmenter: Segmenter, confusion: Int[np.ndarray, "C clusters"]) -> dict[str, Any]:
    """Return the matched confusion matrix, normalised per true class (100 %), and its largest errors."""
    classes = len(confusion)
    matched = np.zeros((classes, len(segmenter.classes)), dtype=np.int64)
    matched[:, segmenter.class_of] = confusion
    share = matched / np.maximum(matched.sum(axis=1, keepdims=True), 1)
    errors = matched.astype(float)
    errors[np.arange(classes), np.arange(classes)] = 0
    worst = np.argsort(-errors, axis=None, kind="stable")[:8]
    pairs = [(int(i) // errors.shape[1], int(i) % errors.shape[1]) for i in worst if errors.flat[i] > 0]
    view: dict[str, Any] = {
        "errors": [
            {
                "true": segmenter.classes[t],
                "predicted": segmenter.classes[p],
                "share": 100 * share[t, p],
                "of_all": 100 * errors[t, p] / max(1, matched.sum()),
            }
            for t, p in pairs
        ],
        "keys": [class_key(segmenter, c) for c in range(len(segmenter.classes))],
        "rows": [],
        "picture": None,
    }
    if len(segmenter.classes) <= _TABLE_CLASSES:
        view["rows"] = [
            [Cell(text=f"{100 * v:.0f}" if v >= 0.005 else "", level=round(10 * float(v))) for v in row]
            for row in share
        ]
    else:
        tone = (255 * (1 - share**0.5)).round().astype(np.uint8)  # the square root makes small shares visible
        sheet = np.stack([tone, tone, np.maximum(tone, 90)], axis=-1)
        scale = max(1, 720 // sheet.shape[1])
        view["picture"] = pictures.png(sheet.repeat(scale, axis=0).repeat(scale, axis=1))
    return view


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A concept: the class it was matched to, the number of its windows, and the windows nearest to its centre."""

    number: int
    kind: str
    key: ClassKey
    windows: int
    shown: int
    """Number of the windows in the picture."""
    src: str
    alt: str


def concept_views(recipe: Recipe, run: Run, segmenter: Segmenter) -> list[Concept]:
    """Return the concepts with their nearest windows, cut from the images."""
    folder = run.artifact("concepts")
    counts = safetensors.numpy.load(storage.read_bytes(folder.file("concepts.safetensors")))["counts"]
    nearest = parquet.read(folder.file("nearest.parquet"))
    nearest = nearest.sort_by([("concept", "ascending"), ("distance", "ascending")])
    columns = 4
    rows = 2 if len(counts) <= 2 * _TABLE_CLASSES else 1
    by_concept: dict[int, list[dict[str, Any]]] = {}
    for window in nearest.to_pylist():
        chosen = by_concept.setdefault(window["concept"], [])
        if len(chosen) < rows * columns:
            chosen.append(window)
    paths = _samples(run, "train")["image"]
    by_image: dict[int, list[dict[str, Any]]] = {}
    for chosen in by_concept.values():
        for window in chosen:
            by_image.setdefault(window["index"], []).append(window)

    def cut(item: tuple[int, list[dict[str, Any]]]) -> list[tuple[int, float, pictures.Pixels]]:
        # Windows are in pixels of the resized image; scale them to the original image and cut there.
        index, windows = item
        image = images.read_image(
            paths[index].as_py(), orient=recipe.dataset.orient, max_pixels=recipe.dataset.max_pixels
        )
        scale = np.array(image.shape[:2]) / recipe.dataset.feature_size
        tiles = []
        for window in windows:
            y0, x0 = np.floor(np.array((window["y0"], window["x0"])) * scale).astype(int)
            y1, x1 = np.ceil(np.array((window["y1"], window["x1"])) * scale).astype(int)
            tiles.append((window["concept"], window["distance"], pictures.square(image[y0:y1, x0:x1], _TILE)))
        return tiles

    found: dict[int, list[tuple[float, pictures.Pixels]]] = {}
    for tiles in _readable(cut, by_image.items()):
        for concept, distance, tile in tiles:
            found.setdefault(concept, []).append((distance, tile))
    views = []
    for number, count in enumerate(counts):
        ordered = [tile for _, tile in sorted(found.get(number, []), key=lambda pair: pair[0])]
        key = class_key(segmenter, int(segmenter.class_of[number + int(recipe.background)]))
        views.append(
            Concept(
                number=number,
                kind="thing" if number < recipe.concepts.things else "stuff",
                key=key,
                windows=int(count),
                shown=len(ordered),
                src=pictures.jpeg(pictures.tiles(ordered, _TILE, columns)) if ordered else "",
                alt=f"the {len(ordered)} windows nearest to concept {number}, matched to {key.name}",
            )
        )
    return sorted(views, key=lambda concept: concept.key.number)


def _pseudo_labels(recipe: Recipe, run: Run, segmenter: Segmenter) -> list[Row]:
    """Return, for a few training images, the label made of all maps, and the maps that win the most patches."""
    parts = [uri for uri in storage.list_files(run.artifact("pseudo_labels").uri) if uri.endswith(".parquet")]
    places = map_files.index_maps(_evenly(parts, _MAPS_SHOWN))
    places = places.take(_evenly(range(len(places)), _MAPS_SHOWN))
    samples = _samples(run, "train").select(["name", "image"])

    def read(place: tuple[int, Int16[np.ndarray, "planes h w"]]) -> tuple[Any, str, pictures.Pixels]:
        index, maps = place
        sample = samples.slice(index, 1).to_pylist()[0]
        return (
            maps,
            sample["name"],
            images.read_image(sample["image"], orient=recipe.dataset.orient, max_pixels=recipe.dataset.max_pixels),
        )

    rows = []
    found = zip(places["index"].to_pylist(), map_files.read_maps(places), strict=True)
    for maps, name, image in _readable(read, found):
        scaled, label = _pseudo_label(recipe, maps)
        mask = segmenter.class_of[_enlarge(label, image.shape[:2])]
        shown = [photo(image, name), _mask(mask, segmenter, "pseudo label")]
        won = np.bincount(scaled.argmax(axis=0).ravel(), minlength=len(scaled))
        strongest = np.argsort(-won, kind="stable")[:3]
        small = pictures.shrink(image, _SIDE)
        for concept in strongest:
            title = segmenter.classes[segmenter.class_of[concept + int(recipe.background)]]
            shown.append(
                Picture(
                    src=pictures.jpeg(pictures.glow(small, scaled[concept])),
                    alt=f"where the concept of {title} is in image {name}, bright where its map is high",
                    title=title,
                )
            )
        rows.append(Row(name=name, pictures=shown))
    return rows


def _pseudo_label(
    recipe: Recipe, maps: Int16[np.ndarray, "planes h w"]
) -> tuple[Float[np.ndarray, "K h w"], Int[np.ndarray, "h w"]]:
    """Return an image's maps scaled to [0, 1], and the largest cluster of each patch, from which training starts."""
    scaled = scale_maps(unpack_maps(torch.from_numpy(maps)[None]))
    evidence = scaled
    if recipe.background:
        evidence = torch.cat((background_map(scaled, recipe.training.background_threshold), scaled), dim=1)
    return scaled[0].numpy(), evidence.argmax(dim=1)[0].numpy()


def _enlarge(label: Int[np.ndarray, "h w"], size: tuple[int, int]) -> Int[np.ndarray, "H W"]:
    rows, columns = (np.arange(side) * cells // side for side, cells in zip(size, label.shape, strict=True))
    enlarged: Int[np.ndarray, "H W"] = label[rows[:, None], columns]
    return enlarged


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A chart and its heading."""

    title: str
    svg: Markup


def _curves(run: Run, kept: int | None) -> dict[str, Any]:
    """Return charts of scores and losses by epoch, with marks for teacher updates and for the kept epoch."""
    history = run.history()
    updates = [float(epoch["epoch"]) for epoch in history if epoch.get("teacher_updated")]
    ends = (float(history[0]["epoch"]), float(history[-1]["epoch"]))
    groups: list[tuple[str, str, tuple[tuple[str, str], ...]]] = [
        ("Scores on the validation images", " %", (("accuracy", "pixel_accuracy"), ("mIoU", "mean_iou"))),
        ("Total loss", "", (("total", "total"),)),
        ("Peer loss", "", (("peer", "peer"),)),
        ("Diversity loss", "", (("diversity", "diversity"),)),
        ("Uncertainty loss", "", (("uncertainty", "uncertainty"),)),
        ("Alpha, the weight of the negative labels", "", (("alpha", "alpha"),)),
    ]
    shown = {key for _, _, lines in groups for _, key in lines}
    others = [key for key, value in history[0].items() if isinstance(value, float) and key not in {*shown, *_NO_LOSS}]
    groups += [(f"{key[0].upper()}{key[1:]} loss", "", ((key, key),)) for key in others]
    drawn = []
    for title, unit, lines in groups:
        points = {
            name: [(float(e["epoch"]), float(e[key])) for e in history if e.get(key) is not None] for name, key in lines
        }
        series = [Series(name=name, points=found) for name, found in points.items() if found]
        if series:
            svg = charts.line_chart(
                title,
                series,
                x_label="epoch",
                x_range=ends,
                unit=unit,
                marks=updates,
                chosen=None if kept is None else float(kept),
                from_zero=bool(unit),
            )
            drawn.append(Curve(title=title, svg=svg))
    return {"charts": drawn, "updates": updates, "history": history}


def _kept(run: Run, metrics: Mapping[str, Any]) -> int | None:
    """Return the epoch whose decoder was kept by its scores on validation labels; None if the last one was kept."""
    scored = [e for e in run.history() if e["mean_iou"] is not None]
    if not scored or "last" not in metrics:
        return None
    return int(max(scored, key=merit)["epoch"])


def _commands(recipe: Recipe, run: Run) -> list[tuple[str, str]]:
    """Return what users commonly do with a finished run, and the commands for it."""
    uri = shlex.quote(storage.shown(run.uri))
    made = [("Masks for a folder of images", f"transfgu predict --run {uri} --images IMAGES --out MASKS")]
    if not recipe.labels and recipe.preset == "folder":
        named = ("Names for the concepts, and merges", f"transfgu name {uri} NAMES.yaml")
        return [*made, named, ("Scores, once there are labels", f"transfgu evaluate --run {uri} --labels LABELS")]
    if "concepts" not in recipe.stages:
        return made
    return [
        *made,
        ("The same images scored by simpler methods", f"transfgu evaluate --run {uri} --baselines"),
        ("Better loss weights", f"transfgu tune {recipe.preset} --trials 20 --run {uri}-search"),
    ]


def _epochs(run: Run, metrics: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return title, mIoU and accuracy of the best and the last epoch; empty if only one decoder was scored."""
    scored = [e for e in run.history() if e["mean_iou"] is not None]
    if not scored or "last" not in metrics:
        return []
    best = max(scored, key=merit)
    return [
        (f"{title}, {epoch['epoch']}", found["mean_iou"], found["pixel_accuracy"])
        for title, epoch, found in (("best", best, metrics), ("last", scored[-1], metrics["last"]))
    ]


@dataclass(frozen=True, kw_only=True)
class Time:
    """The duration of a stage."""

    title: str
    seconds: float
    share: float
    items: int
    skipped: bool
    details: str


def _times(stages: Mapping[str, Manifest], metrics: Mapping[str, Any]) -> list[Time]:
    total = sum(manifest.seconds for manifest in stages.values()) or 1.0
    return [
        Time(
            title=_TITLES[stage],
            seconds=manifest.seconds,
            share=100 * manifest.seconds / total,
            items=manifest.outcome.items,
            skipped=metrics["stages"][stage]["skipped"],
            details=", ".join(_details(manifest.outcome.details)),
        )
        for stage, manifest in stages.items()
    ]


def _details(details: Mapping[str, Any]) -> Iterator[str]:
    for name, value in details.items():
        if isinstance(value, Mapping):
            yield from (f"{kind} {name} {count}" for kind, count in value.items())
        elif isinstance(value, int | float | str):
            yield f"{name.replace('_', ' ')} {_value(value)}"


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _left_out(stages: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """Return the inputs that were not used, by stage and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for stage, manifest in stages.items():
        for left in manifest.outcome.left_out:
            groups.setdefault((stage, left.reason), []).append(left.name)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        {"stage": _TITLES[stage], "reason": reason, "count": len(names), "names": names[:_NAMED]}
        for (stage, reason), names in ordered
    ]


def _changes(recipe: Recipe) -> list[dict[str, str]]:
    """Return the fields that differ from the preset."""
    published, own = preset(recipe.preset, recipe.method).flat(), recipe.flat()
    return [
        {"name": name, "doc": FIELDS[name].doc, "value": _shown(own[name]), "preset": _shown(published[name])}
        for name in own
        if own[name] != published[name] and not name.startswith("compute.")
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value == "" else str(value)


# Reading artefacts.


def _confusion(run: Run) -> Int[np.ndarray, "C clusters"] | None:
    """Return the confusion matrix of the validation set, true class by cluster; None if no pixel is labelled."""
    data = storage.read_bytes_or_none(run.artifact("evaluation").file("confusion.safetensors"))
    confusion = None if data is None else safetensors.numpy.load(data)["model"]
    return confusion if confusion is not None and confusion.any() else None


def _samples(run: Run, split: str) -> pa.Table:
    return parquet.read(run.artifact("samples").file(f"{split}.parquet"))


def _evenly(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items at equal distances, starting with the first; all items if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def spread(table: pa.Table, count: int) -> list[dict[str, Any]]:
    """Return `count` rows of a table at equal distances; all rows if there are fewer."""
    rows: list[dict[str, Any]] = table.take(_evenly(range(len(table)), count)).to_pylist()
    return rows


def _readable(read: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Return the results of `read` for all items, in order, read in parallel; unreadable items are skipped."""

    def attempt(item: S) -> T | None:
        try:
            return read(item)
        except BadInput:
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        return [result for result in pool.map(attempt, items) if result is not None]
