"""The search's report: charts with coordinates derived by hand, and a well-formed page."""

import re
from html.parser import HTMLParser

import pytest

from tests.search.test_trials import search, trial
from transfgu.report import charts
from transfgu.report import search as search_report
from transfgu.report.charts import Axis, Mark
from transfgu.search import trials


class Page(HTMLParser):
    """Checks that every open tag is closed, ids are unique, and links within the page have targets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"][1:]] if found.get("href", "").startswith("#") else []
        self.sources += [found[n] for n in ("src", "href") if n in found and not found[n].startswith(("#", "data:"))]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_axes() -> None:
    assert Axis(name="x", low=0, high=4).place(1) == 0.25
    assert Axis(name="x", low=0.1, high=10, log=True).place(1) == pytest.approx(0.5)
    assert Axis(name="x", low=3, high=3).place(3) == 0.5
    assert Axis(name="x", low=0.1, high=10, log=True).ticks() == pytest.approx([0.1, 1, 10])
    assert Axis(name="x", low=2.0, high=5.0, log=True).ticks() == [2, 5]
    assert Axis(name="x", low=0, high=4).ticks() == [0, 1, 2, 3, 4]
    assert Axis(name="x", low=0.5, high=3.5).ticks() == [1, 2, 3]
    assert Axis(name="epoch", low=1, high=2, whole=True).ticks() == [1, 2]


def test_curves_end_in_a_cross_where_they_were_stopped() -> None:
    marks = [
        Mark(points=[(1, 0), (2, 10)], kind="best", name="trial 0"),
        Mark(points=[(1, 5)], kind="stopped", name="trial 1"),
    ]
    svg = str(
        charts.curves_chart("curves", marks, x=Axis(name="epoch", low=1, high=2), y=Axis(name="mIoU", low=0, high=10))
    )
    # The plot is x from 46 to 440 - 0.6 * 118 = 369.2, y from 200 up to 14.
    assert 'class="line best" d="M46.0 200.0 L369.2 14.0"' in svg
    assert 'class="cross" d="M43 104l6 6M43 110l6 -6"' in svg
    assert svg.count("<circle") == 1
    assert ">trial 0</text>" in svg
    assert "trial 1" not in svg
    assert svg.index("stopped") < svg.index("best")  # the best lies on top


def test_parallel_coordinates() -> None:
    axes = [Axis(name="a", low=0, high=1), Axis(name="b", low=1, high=100, log=True), Axis(name="mIoU", low=0, high=50)]
    mark = Mark(points=[(0, 1), (1, 10), (2, 0)], kind="finished", name="trial 0")
    svg = str(charts.parallel_chart("all", axes, [mark]))
    # Width 704: axes at 118, 352 and 586; the middle of 14 to 200 is 107.
    assert 'd="M118.0 14.0 L352.0 107.0 L586.0 200.0"' in svg
    assert svg.count('class="axis"') == 3


FOUND = [
    trial(0, 30, 31, 32, 33, omega_1=2.0),
    trial(1, 10, status="stopped", omega_1=9.0),
    trial(2, 20, 25, 21, 22, omega_1=4.0),
    trial(3, 25, 26, 27, 30, omega_1=3.0),
    trial(4, status="failed", omega_1=0.0),
    trial(5, 22, status="running", omega_1=1.0),
]
FOUND[4].reason = "out of memory: <big>"
METRICS = {
    "preset": "shapes",
    "trials": {"finished": 3, "stopped": 1, "failed": 1, "running": 1},
    "epochs": {"trained": 14, "asked": 24},
    "rank_correlation": {
        "finished": dict(zip(("spearman", "trials"), trials.rank_correlation(FOUND), strict=True)),
        "epoch 1": {"spearman": None, "trials": 5},
    },
    "stages": {"samples": {}, "features": {}},
    "stages_of_single_trials": {"concepts": 2},
}


@pytest.mark.parametrize("objective", ["mean_iou", "label_free"])
def test_the_page(objective: str) -> None:
    asked = search("/nowhere/at/all", objective=objective, hours=1.0)
    text = search_report.render(asked, FOUND, METRICS)
    page = Page(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.links) <= set(page.ids)
    assert page.sources == []
    assert ("labels chose this recipe" in text) == (objective == "mean_iou")
    assert "Rank correlation (Spearman) over 3 trials, at their ends: <b>1.00</b>" in text
    assert "out of memory: &lt;big&gt;" in text
    assert "14</b>of 24 epochs" in text
    assert "samples, features" in text
    assert "concepts was computed 2 times" in text
    assert text.count('class="line best"') == 2  # parallel coordinates, learning curves
    assert text.count('class="line stopped"') == 4  # the stopped one and the unfinished one in each
    rows = re.findall(r'<tr[^>]*><th scope="row">(\d)</th>', text)
    assert rows == ["0", "3", "2", "5", "1", "4"]


def test_a_page_without_a_winner() -> None:
    metrics = {
        "preset": "shapes",
        "trials": {"finished": 0, "stopped": 0, "failed": 1, "running": 0},
        "epochs": {"trained": 0, "asked": 4},
        "rank_correlation": {},
        "stages": {},
        "stages_of_single_trials": {},
    }
    text = search_report.render(search(), [FOUND[4]], metrics)
    page = Page(text)
    assert page.open == []
    assert set(page.links) <= set(page.ids)
    assert "nothing" in text
