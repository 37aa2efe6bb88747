"""The report of a small run: complete, self-contained, well-formed, and consistent with the artefacts."""

import base64
import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.made_run import VALIDATION, MadeRun, make_run
from transfgu.datasets import pictures
from transfgu.presets import PRESETS
from transfgu.report import page as report
from transfgu.report.published import TABLE_1
from transfgu.segmenter import Segmenter

_VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests check."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]


def write(made: MadeRun) -> Page:
    uri = report.write(made.recipe, made.run, made.stages, made.metrics)
    assert uri == made.run.file("report.html")
    return Page(Path(uri).read_text())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def page(labelled: MadeRun) -> Page:
    return write(labelled)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write(make_run(tmp_path_factory.mktemp("bare"), labels=False, things=4, stuff=0))


def test_everything_is_in_the_file(page: Page, bare: Page) -> None:
    for found in (page, bare):
        links = [a[n] or "" for _, a in found.attributes for n in ("src", "href", "srcset", "data") if n in a]
        ids = {a["id"] for _, a in found.attributes if "id" in a}
        assert links
        for link in links:
            assert link.startswith(("data:", "#")), link
            assert not link.startswith("#") or link[1:] in ids, link
        assert found.tags["script"] == 1  # its own, in the file
        assert not any("src" in a for a in found.all("script"))
        assert "url(" not in found.text
        assert "@import" not in found.text


def test_a_person_who_sees_little_can_read_it(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("meta")[1]["name"] == "viewport"
    assert page.tags["h1"] == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert "prefers-color-scheme: dark" in page.text


def test_every_section_is_there_with_labels(page: Page, labelled: MadeRun) -> None:
    sections = {a["id"] for a in page.all("h2")}
    assert sections == {
        *("what", "next", "scores", "pictures", "classes", "confusion", "concepts"),
        *("pseudo-labels", "training", "time", "left-out", "recipe"),
    }
    assert f"mIoU {labelled.metrics['mean_iou']:.2f}" not in page.text  # the title is shorter
    assert f"{labelled.metrics['mean_iou']:.2f} %" in page.text
    assert f"{labelled.metrics['pixel_accuracy']:.2f} %" in page.text
    assert "best, 6" in page.text
    assert "Protocol (published): as published: image and label at 64 x 64 pixels." in page.text
    assert "54 in all" in page.text
    assert "broken & bent.png" in page.text
    assert "Samples (skipped)" in page.text
    assert "Evaluation took the most time" in page.text
    assert "windows.size" in page.text


def test_the_grid_shows_image_prediction_and_truth(page: Page, bare: Page) -> None:
    alts = [image["alt"] or "" for image in page.all("img")]
    assert sum(alt.startswith("image scene") for alt in alts) == VALIDATION + 4  # and of the pseudo labels
    assert sum(alt.startswith("prediction: ") for alt in alts) == VALIDATION
    assert sum(alt.startswith("ground truth: ") for alt in alts) == VALIDATION
    assert sum(alt.startswith("pseudo label: ") for alt in alts) == 4
    assert sum(alt.startswith("where the concept of") for alt in alts) == 12
    assert sum(" windows nearest to concept " in alt for alt in alts) == 10
    most = max(int(alt.split()[1]) for alt in alts if " windows nearest to concept " in alt)
    assert f"The {most} windows nearest to the centre of each concept" in page.text
    names = " ".join(page.texts)
    assert all(f"scene <{i}>" in names for i in range(VALIDATION))
    without = [image["alt"] or "" for image in bare.all("img")]
    assert sum(alt.startswith("prediction: ") for alt in without) == VALIDATION
    assert not any("ground truth" in alt for alt in without)


def test_classes_show_precision_recall_and_their_cluster(labelled: MadeRun, page: Page) -> None:
    segmenter = Segmenter.load(labelled.run.uri)
    confusion = np.array([[6, 2, 0], [1, 3, 0], [0, 5, 3]])
    segmenter.classes, segmenter.colours = ("a", "b", "c"), ((0, 0, 0),) * 3
    bars = {bar.key.name: bar for bar in report.class_bars(segmenter, confusion)["best"]}
    assert bars["a"].precision == pytest.approx(600 / 7)
    assert bars["a"].recall == 75.0
    assert (bars["b"].precision, bars["b"].recall) == (30.0, 75.0)
    assert (bars["c"].precision, bars["c"].recall, bars["c"].cluster) == (100.0, 37.5, 2)
    assert "precision, %" in page.text


def test_errors_are_orange_and_unlabelled_pixels_grey() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    painted = pictures.error_map(image, np.array([[1, 2, 0]]), np.array([[1, 1, -1]]))
    assert painted[0].tolist() == [[100, 100, 100], [191, 106, 35], [150, 150, 150]]


def test_a_run_says_when_and_how_it_was_made_and_what_comes_next(labelled: MadeRun) -> None:
    made = {"finished": "2026-11-27 10:00 UTC", "version": "0.1.0", "machine": "2 cores"}
    text = Page(report.render(labelled.recipe, labelled.run, labelled.stages, labelled.metrics | {"made": made})).text
    assert "Finished 2026-11-27 10:00 UTC by transfgu 0.1.0 on 2 cores." in text
    assert f"transfgu predict --run {labelled.run.uri} --images IMAGES --out MASKS" in text
    assert "whose decoder was kept" not in text or "epoch 6, whose decoder was kept" in text


def test_pale_classes_are_hatched() -> None:
    pale, dark = (245, 245, 245), (228, 26, 28)
    painted = pictures.paint(np.repeat([[0], [1]], 16, axis=0).repeat(32, axis=1), [pale, dark], 32)
    assert {tuple(c) for c in painted[:16].reshape(-1, 3).tolist()} == {pale, pictures.HATCH}
    assert {tuple(c) for c in painted[17:].reshape(-1, 3).tolist()} == {dark}
    assert (painted[:16] == pictures.HATCH).all(axis=2).mean() == 0.25
    assert "gradient" in pictures.css(pale)
    assert pictures.css(dark) == "#e41a1c"


def test_the_truth_is_painted_in_its_classes_colours(page: Page) -> None:
    truth = next(image for image in page.all("img") if (image["alt"] or "").startswith("ground truth: "))
    _, _, data = (truth["src"] or "").partition("base64,")
    painted = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    colours = {tuple(c) for c in painted.reshape(-1, 3).tolist()}
    # The first scene: a target and a quilt before a meadow, and the outlines.
    assert colours == {(228, 26, 28), (255, 221, 51), (77, 160, 70), (20, 20, 20)}


def test_without_labels_it_says_so(bare: Page) -> None:
    assert "There are no scores" in bare.text
    assert "%, pixel accuracy" not in bare.text
    assert {"classes", "confusion"}.isdisjoint({a["id"] for a in bare.all("h2")})
    assert "concept 4" in bare.text
    assert "background" in bare.text


def test_a_published_benchmark_stands_beside_the_paper(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    recipe = made.recipe.with_fields({"preset": "cityscapes"})
    text = report.render(recipe, made.run, made.stages, made.metrics)
    found = Page(text).text
    for method in ("IIC 6.35 47.88", "PiCIE 12.31 65.50", "TransFGU, published 16.83 77.92"):
        assert method in found
    assert f"this run {made.metrics['mean_iou']:.2f} {made.metrics['pixel_accuracy']:.2f}" in found
    assert "differs from the published benchmark" in found


def test_the_papers_table_has_every_published_preset() -> None:
    assert set(TABLE_1) == set(PRESETS) - {"shapes", "folder"}
    for rows in TABLE_1.values():
        assert rows[-1].method == "TransFGU, published"
        assert sorted(r.mean_iou for r in rows) == [r.mean_iou for r in rows]


def test_many_classes_and_many_inputs_left_out(tmp_path: Path) -> None:
    made = make_run(tmp_path, labels=False, things=30, stuff=12)
    found = write(made)
    assert sum(" windows nearest to concept " in (image["alt"] or "") for image in found.all("img")) == 42
    confusion = np.diag(np.arange(10, 52))
    confusion[0, 1] = 7
    segmenter = Segmenter.load(made.run.uri)
    view = report.confusion_view(segmenter, confusion)
    assert view["rows"] == []
    assert view["picture"].startswith("data:image/png;base64,")
    assert [(e["true"], e["predicted"], e["share"]) for e in view["errors"]] == [
        ("concept 0", "concept 1", pytest.approx(100 * 7 / 17))
    ]
    bars = report.class_bars(segmenter, confusion)
    assert [len(bars[part]) for part in ("best", "between", "worst")] == [12, 18, 12]
    assert bars["worst"][-1].key.name == "concept 0"  # 10 of 17 pixels
    assert bars["worst"][-1].iou == pytest.approx(100 * 10 / 17)


def test_an_image_that_is_gone_leaves_the_rest(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    (tmp_path / "validation-image-0.png").unlink()
    (tmp_path / "train-image-0.png").write_bytes(b"")
    found = write(made)
    alts = [image["alt"] or "" for image in found.all("img")]
    assert sum(alt.startswith("prediction: ") for alt in alts) == VALIDATION - 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.5, "9.5 s"), (59.7, "1 min 0 s"), (200.0, "3 min 20 s"), (7260.0, "2 h 1 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert report.duration(seconds) == words
