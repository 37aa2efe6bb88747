"""Write the table, the pictures and the page of a comparison of several methods on the same images, over several seeds.

Everything is read from the files of the runs, so a comparison can be written again at any time.
"""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from transfgu import datasets
from transfgu.baselines.comparison import Scored
from transfgu.datasets import images
from transfgu.errors import BadInput
from transfgu.recipe import Recipe
from transfgu.report import page
from transfgu.report.published import METHODS as PUBLISHED_NAMES
from transfgu.report.published import TABLE_1, Result
from transfgu.segmenter import Segmenter
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Run

TABLE = "comparison.csv"
"""The scores, one row per method and seed."""
SUMMARY = "comparison.md"
"""Mean and standard deviation of each method, with the published figures."""
PAGE = "comparison.html"
"""The same with pictures."""

_IMAGES = 6  # rows of pictures
_SIDE = 240  # px, a picture's longer side
_SCORES = ("mean_iou", "pixel_accuracy", "untrained_mean_iou", "untrained_pixel_accuracy")  # of a run, percent


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One method over its seeds: mean and sample standard deviation, percent (None: fewer than two scores)."""

    method: str
    scored: int
    mean_iou: float | None
    mean_iou_deviation: float | None
    pixel_accuracy: float | None
    pixel_accuracy_deviation: float | None
    untrained_mean_iou: float | None
    untrained_pixel_accuracy: float | None
    seconds: float
    published: Result | None
    failures: tuple[str, ...]

    @property
    def mean_iou_text(self) -> str:
        """Mean and deviation, such as ``17.5 ± 0.3``."""
        return _with_deviation(self.mean_iou, self.mean_iou_deviation)

    @property
    def pixel_accuracy_text(self) -> str:
        """Mean and deviation, such as ``52.7 ± 1.1``."""
        return _with_deviation(self.pixel_accuracy, self.pixel_accuracy_deviation)

    @property
    def untrained_text(self) -> str:
        """Means of the untrained networks' mIoU and pixel accuracy, such as ``6.1, 24.9``."""
        if self.untrained_mean_iou is None or self.untrained_pixel_accuracy is None:
            return "–"
        return f"{self.untrained_mean_iou:.1f}, {self.untrained_pixel_accuracy:.1f}"


def summarise(rows: Sequence[Scored], preset: str) -> list[Summary]:
    """Summarise each method, in the order in which the methods first appear.

    Args:
        rows: the runs.
        preset: the benchmark, for the published figures (TransFGU, Table 1).
    """
    published = {result.method: result for result in TABLE_1.get(preset, ())}
    summaries = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        mean_iou, pixel_accuracy, untrained_mean_iou, untrained_pixel_accuracy = (
            [value for value in (getattr(row, name) for row in own) if value is not None] for name in _SCORES
        )
        summaries.append(
            Summary(
                method=method,
                scored=len(mean_iou),
                mean_iou=_mean(mean_iou),
                mean_iou_deviation=_deviation(mean_iou),
                pixel_accuracy=_mean(pixel_accuracy),
                pixel_accuracy_deviation=_deviation(pixel_accuracy),
                untrained_mean_iou=_mean(untrained_mean_iou),
                untrained_pixel_accuracy=_mean(untrained_pixel_accuracy),
                seconds=_mean([row.seconds for row in own if not row.failure]) or 0.0,
                published=published.get(PUBLISHED_NAMES.get(method, "")),
                failures=tuple(f"seed {row.seed}: {row.failure}" for row in own if row.failure),
            )
        )
    return summaries


def table_csv(rows: Sequence[Scored]) -> str:
    """Return the rows as CSV: method, seed, mean_iou, pixel_accuracy (percent), seconds, untrained network's scores.

    Fields that a run does not have are left blank.
    """
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["method", "seed", *_SCORES[:2], "seconds", *_SCORES[2:]])
    for row in rows:
        trained, untrained = (
            ["" if value is None else value for value in pair]
            for pair in ((row.mean_iou, row.pixel_accuracy), (row.untrained_mean_iou, row.untrained_pixel_accuracy))
        )
        writer.writerow([row.method, row.seed, *trained, round(row.seconds, 1), *untrained])
    return sink.getvalue()


def table_markdown(summaries: Sequence[Summary]) -> str:
    """Return the summaries as a Markdown table, followed by the failed runs."""
    lines = [
        "| method | seeds | mIoU, % | pixel accuracy, % | untrained mIoU, accuracy | published mIoU, accuracy "
        "| seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in summaries:
        published = f"{row.published.mean_iou:.2f}, {row.published.pixel_accuracy:.2f}" if row.published else "–"
        scores = f"{row.mean_iou_text} | {row.pixel_accuracy_text} | {row.untrained_text}"
        lines.append(f"| {row.method} | {row.scored} | {scores} | {published} | {row.seconds:.0f} |")
    failures = [f"- {row.method}, {failure}" for row in summaries for failure in row.failures]
    return "\n".join([*lines, *(["", "Failed:", "", *failures] if failures else [])]) + "\n"


def write(recipe: Recipe, uri: str, rows: Sequence[Scored]) -> str:
    """Write `comparison.csv`, `comparison.md` and `comparison.html` into the comparison's folder.

    Args:
        recipe: common recipe of the runs.
        uri: the folder.
        rows: the runs, in the order of the table.

    Returns:
        The page's URI.
    """
    summaries = summarise(rows, recipe.preset)
    storage.write_bytes(storage.join(uri, TABLE), table_csv(rows).encode())
    storage.write_bytes(storage.join(uri, SUMMARY), table_markdown(summaries).encode())
    where = storage.join(uri, PAGE)
    storage.write_bytes(where, render(recipe, rows, summaries).encode())
    return where


def render(recipe: Recipe, rows: Sequence[Scored], summaries: Sequence[Summary]) -> str:
    """Return the page as HTML; arguments as in :func:`write`, with the summaries of the rows."""
    best = max((row.mean_iou for row in summaries if row.mean_iou is not None), default=None)
    grid, legend = _grid(recipe, rows)
    return page.template("comparison.html").render(
        recipe=recipe, rows=rows, summaries=summaries, best=best, grid=grid, legend=legend
    )


def _grid(recipe: Recipe, rows: Sequence[Scored]) -> tuple[list[page.Row], list[page.ClassKey]]:
    """Return a few validation images with ground truth and the prediction of each method (first seed with a score)."""
    shown = {row.method: row for row in reversed(rows) if not row.failure}
    methods = [method for method in dict.fromkeys(row.method for row in rows) if method in shown]
    if not methods:
        return [], []
    segmenters = {method: Segmenter.load(shown[method].run) for method in methods}
    known = datasets.classes(recipe)
    samples = parquet.read(Run(shown[methods[0]].run).artifact("samples").file("validation.parquet"))
    grid = []
    for sample in page.spread(samples, _IMAGES):
        try:
            image = images.read_image(
                sample["image"], orient=recipe.dataset.orient, max_pixels=recipe.dataset.max_pixels
            )
            label = None if sample["label"] is None else images.read_label(sample["label"], known, image.shape[:2])
        except BadInput:
            continue  # the runs count and name it
        row = [page.photo(image, sample["name"], _SIDE)]
        if label is not None:
            row.append(page.mask_picture(label, known.colours, known.names, "ground truth", _SIDE))
        for method, segmenter in segmenters.items():
            mask = segmenter.predict(image)
            row.append(page.mask_picture(mask, segmenter.colours, segmenter.classes, method, _SIDE))
        grid.append(page.Row(name=sample["name"], pictures=row))
    numbers = {key.number for row in grid for picture in row.pictures for key in picture.keys}
    return grid, [page.class_key(segmenters[methods[0]], number) for number in sorted(numbers)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _with_deviation(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
