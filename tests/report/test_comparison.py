"""A comparison's table has the means of its runs and the published figures, and its page shows their masks."""

import csv
import io
from pathlib import Path

import pytest

from tests.made_run import MadeRun, make_run
from tests.report.test_page import Page
from transfgu.baselines.comparison import Scored
from transfgu.report import comparison

ROWS = [
    Scored(
        method="iic", seed=1, run="/runs/a", mean_iou=10.0, pixel_accuracy=30.0, seconds=60.0,
        untrained_mean_iou=4.0, untrained_pixel_accuracy=20.0,
    ),
    Scored(
        method="iic", seed=2, run="/runs/b", mean_iou=14.0, pixel_accuracy=40.0, seconds=100.0,
        untrained_mean_iou=6.0, untrained_pixel_accuracy=21.0,
    ),
    Scored(method="transfgu", seed=1, run="/runs/c", mean_iou=17.0, pixel_accuracy=50.0, seconds=20.0),
    Scored(method="transfgu", seed=2, run="/runs/d", failure="the disk is full"),
]  # fmt: skip


def test_mean_and_deviation_by_hand() -> None:
    iic, transfgu = comparison.summarise(ROWS, "cityscapes")
    assert (iic.mean_iou, iic.pixel_accuracy, iic.seconds, iic.scored) == (12.0, 35.0, 80.0, 2)
    assert iic.mean_iou_deviation == pytest.approx(8**0.5)  # ((-2)^2 + 2^2) / (2 - 1)
    assert iic.mean_iou_text == "12.0 ± 2.8"
    assert (iic.untrained_mean_iou, iic.untrained_pixel_accuracy) == (5.0, 20.5)
    assert (transfgu.untrained_mean_iou, transfgu.untrained_text) == (None, "–")
    assert iic.published is not None
    assert (iic.published.mean_iou, iic.published.pixel_accuracy) == (6.35, 47.88)
    assert (transfgu.mean_iou, transfgu.mean_iou_deviation, transfgu.scored) == (17.0, None, 1)
    assert transfgu.failures == ("seed 2: the disk is full",)


def test_the_tables() -> None:
    rows = list(csv.DictReader(io.StringIO(comparison.table_csv(ROWS))))
    assert list(rows[0])[:5] == ["method", "seed", "mean_iou", "pixel_accuracy", "seconds"]
    assert [row["untrained_mean_iou"] for row in rows] == ["4.0", "6.0", "", ""]
    assert [float(row["mean_iou"]) for row in rows[:3]] == [10.0, 14.0, 17.0]
    assert (rows[3]["method"], rows[3]["mean_iou"], rows[3]["pixel_accuracy"]) == ("transfgu", "", "")
    table = comparison.table_markdown(comparison.summarise(ROWS, "shapes"))
    assert "| iic | 2 | 12.0 ± 2.8 | 35.0 ± 7.1 | 5.0, 20.5 | – | 80 |" in table
    assert "- transfgu, seed 2: the disk is full" in table


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"))


def rows_of(made: MadeRun) -> list[Scored]:
    """Return two methods that both have the run's masks, and one that failed."""
    rows = [
        Scored(method=method, seed=1, run=made.run.uri, mean_iou=score, pixel_accuracy=50.0, seconds=5.0)
        for method, score in (("transfgu", 20.0), ("token-kmeans", 10.0))
    ]
    rows.append(Scored(method="iic", seed=1, run="/nowhere", failure="no images"))
    return rows


def test_the_page_shows_each_methods_masks_beside_image_and_truth(made: MadeRun, tmp_path: Path) -> None:
    page = Page(Path(comparison.write(made.recipe, str(tmp_path), rows_of(made))).read_text())
    alts = [image["alt"] or "" for image in page.all("img")]
    for what in ("image scene", "ground truth: ", "transfgu: ", "token-kmeans: "):
        assert sum(alt.startswith(what) for alt in alts) == 5
    assert not any(alt.startswith("iic: ") for alt in alts)
    assert "no images" in page.text
    assert (tmp_path / "comparison.csv").exists()
    assert (tmp_path / "comparison.md").exists()
