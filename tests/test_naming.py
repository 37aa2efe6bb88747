"""Naming a run: everything that shows its classes changes, nothing is computed again, and it can be undone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from huggingface_hub import ModelCard
from PIL import Image

from tests.made_run import MadeRun, make_run
from transfgu import naming, pipeline
from transfgu.baselines.masks import score_masks
from transfgu.cli import export, train
from transfgu.cli import name as command
from transfgu.errors import UserError
from transfgu.metrics import scores
from transfgu.report import page
from transfgu.segmenter import Segmenter
from transfgu.sharing.onnx_export import PatchesToClasses
from transfgu.stages import prediction, samples
from transfgu.stages.prediction import PredictionJob


@pytest.fixture
def labelled(tmp_path: Path) -> MadeRun:
    (tmp_path / "labelled").mkdir()
    return finished(make_run(tmp_path / "labelled"))


@pytest.fixture
def bare(tmp_path: Path) -> MadeRun:
    (tmp_path / "bare").mkdir()
    return finished(make_run(tmp_path / "bare", labels=False, things=4, stuff=2))


def finished(made: MadeRun) -> MadeRun:
    for stage, manifest in made.stages.items():
        Path(made.run.artifact(stage).file("manifest.json")).write_text(manifest.to_json())
    metrics = {**made.metrics, "left_out": [], "protocol": "published", "made": None}
    metrics |= pipeline.scores_of(made.recipe, made.run)
    Path(made.run.file("metrics.json")).write_text(json.dumps(metrics))
    return made


def masks_of(made: MadeRun, folder: Path, kind: prediction.Format = "png") -> Path:
    """The masks of the validation images, as written by `predict`, without Ray."""
    images = folder / "images"
    images.mkdir(parents=True)
    for row in samples.labelled(made.recipe, made.run).to_pylist() or []:
        shutil.copy(row["image"], images / f"{row['index']}.png")
    if not list(images.iterdir()):
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.png")
    job = PredictionJob(run=made.run.uri, images=str(images), out=str(folder / "out"), format=kind)
    table = prediction.named_samples(prediction.preflight(job))
    read = prediction.ReadPhotos(size=prediction.model_size(job), interpolation="bilinear", keep_files=False)
    prediction.WriteMasks(job=job)(prediction.PredictMasks(job.run, 1)(read(table)))
    return folder / "out"


def pixels(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted((out / "masks").iterdir())]


def test_a_merged_runs_score_is_that_of_its_masks_re_indexed(labelled: MadeRun, tmp_path: Path) -> None:
    """In all digits: from the run's counts, from masks re-indexed by hand, and from new masks."""
    given = {3: "thing", 7: "thing", 9: "ignore"}
    before = masks_of(labelled, tmp_path / "before")
    naming.name_classes(labelled.run, given)
    kept = json.loads(Path(labelled.run.file("metrics.json")).read_text())
    table = pipeline.class_table(labelled.recipe, labelled.run)
    rows = samples.labelled(labelled.recipe, labelled.run)
    rows = rows.set_column(rows.column_names.index("name"), "name", [[str(i) for i in rows["index"].to_pylist()]])
    by_hand = np.zeros((10, 9), np.int64)
    for row, mask in zip(rows.to_pylist(), pixels(before), strict=True):
        label = np.asarray(Image.open(row["label"]))
        # 3 and 7 become 3, 4 to 6 stay, 8 becomes 7, and 9, which is ignored, the last: 8.
        np.add.at(by_hand, (label, np.array([0, 1, 2, 3, 4, 5, 6, 3, 7, 8])[mask]), 1)
    expected = scores(by_hand, ignored=1)
    assert table.index_of.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 7, 8]
    assert kept["named"]["mean_iou"] == expected.mean_iou
    assert kept["named"]["pixel_accuracy"] == expected.pixel_accuracy
    assert kept["mean_iou"] == labelled.metrics["mean_iou"]

    naming.reindex(str(before), labelled.run)
    after = masks_of(labelled, tmp_path / "after")
    for out in (before, after):
        counted = score_masks(labelled.recipe.with_fields({"protocol": "label"}), rows, str(out))
        np.testing.assert_array_equal(counted.confusion, by_hand)
        scored = scores(counted.confusion, counted.ignored)
        found = pipeline.evaluation_result(labelled.recipe, labelled.run, scored, 5, ())
        assert found["mean_iou"] == expected.mean_iou
        assert found["pixel_accuracy"] == expected.pixel_accuracy
    for one, other in zip(pixels(before), pixels(after), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_masks_follow_other_names_and_come_back(bare: MadeRun, tmp_path: Path, kind: prediction.Format) -> None:
    out = masks_of(bare, tmp_path / "some", kind)
    claim = out / "prediction.json"

    def held() -> list[np.ndarray]:
        if kind == "png":
            return pixels(out)
        rows = pq.read_table(out / "masks").to_pylist()
        return [np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"]) for row in rows]

    job = PredictionJob(run=bare.run.uri, images=str(out.parent / "images"), out=str(out), format=kind)
    first, told = held(), json.loads(claim.read_text())
    for given, index_of in (
        ({1: "a", 5: "a"}, [0, 1, 2, 3, 4, 1]),
        ({0: "b", 1: "b"}, [0, 0, 1, 2, 3, 4]),  # from the masks as they were predicted, not from merged ones
        ({2: "only a name"}, [0, 1, 2, 3, 4, 5]),
        ({0: "b", 1: "b"}, [0, 0, 1, 2, 3, 4]),
    ):
        naming.name_classes(bare.run, given)
        with pytest.raises(UserError) as caught:
            prediction.preflight(job)
        assert caught.value.code == "masks-named-otherwise"
        assert naming.reindex(str(out), bare.run).removed == 0
        assert naming.reindex(str(out), bare.run).removed == 0  # as if it had been stopped before its end
        for mask, before in zip(held(), first, strict=True):
            np.testing.assert_array_equal(mask, np.array(index_of)[before])
        names = [found["name"] for found in json.loads(claim.read_text())["classes"]]
        assert names == list(Segmenter.load(bare.run.uri).classes)
        prediction.preflight(job)
    # A mask that was made under merged names alone has no unnamed form: it is removed, to be made again.
    masks = sorted((out / "masks").iterdir())
    (out / "unnamed" / masks[0].name).unlink()
    naming.name_classes(bare.run, {})
    done = naming.reindex(str(out), bare.run)
    assert (done.files, done.removed) == (len(masks) - 1, 1)
    for mask, before in zip(held(), first[1:], strict=False):
        np.testing.assert_array_equal(mask, before)
    assert json.loads(claim.read_text()) == told
    assert not (out / "unnamed").exists()


def test_masks_of_another_model_are_refused(bare: MadeRun, labelled: MadeRun, tmp_path: Path) -> None:
    out = masks_of(bare, tmp_path / "some")
    for place, run, code in ((out, labelled.run, "masks-of-another-model"), (tmp_path, bare.run, "masks-missing")):
        with pytest.raises(UserError) as caught:
            naming.reindex(str(place), run)
        assert caught.value.code == code


def test_segmenter_card_and_report_follow(bare: MadeRun, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    plain = Segmenter.load(bare.run.uri)
    before, shares = plain.predict(photo), plain.predict(photo, probabilities=True)
    naming.name_classes(bare.run, {1: "cow", 3: "cow", 5: "ignore"}, page.write, say=lambda _: None)
    segmenter = Segmenter.load(bare.run.uri)
    index_of = np.array([0, 1, 2, 1, 3, 4])
    assert segmenter.classes == ("concept 0", "cow", "concept 2", "concept 4", "ignore")
    assert segmenter.colours[:2] == plain.colours[:2]
    np.testing.assert_array_equal(segmenter.predict(photo), index_of[before])
    merged = segmenter.predict(photo, probabilities=True)
    np.testing.assert_allclose(merged[1], shares[1] + shares[3], rtol=1e-5)
    np.testing.assert_allclose(merged.sum(axis=0), 1, atol=1e-5)
    report = Path(bare.run.file("report.html")).read_text()
    assert "cow" in report
    assert "matched to cow" in report
    segmenter.save_pretrained(tmp_path / "shared")
    card = ModelCard.load(tmp_path / "shared" / "README.md").text
    assert "| 1 | cow |" in card
    assert "| 4 | ignore |" in card
    shared = Segmenter.from_pretrained(tmp_path / "shared")
    assert shared.classes == segmenter.classes
    np.testing.assert_array_equal(shared.predict(photo), segmenter.predict(photo))
    # The decoder's graph gives a class of several clusters the largest one's logit.
    import torch

    patches = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    clusters = segmenter.decoder.eval()(patches)[0]
    logits = PatchesToClasses(segmenter.decoder, segmenter.class_of)(patches)
    assert logits.shape == (2, 7, 5)
    expected = torch.from_numpy(segmenter.class_of)[clusters.argmax(dim=-1)]
    assert torch.equal(logits.argmax(dim=-1), expected)
    assert Segmenter.load(bare.run.uri, named=False).classes == plain.classes


def test_a_labelled_runs_card_and_report_after_a_merge(labelled: MadeRun, tmp_path: Path) -> None:
    naming.name_classes(labelled.run, {0: "both", 1: "both"}, page.write, say=lambda _: None)
    report = Path(labelled.run.file("report.html")).read_text()
    assert "Its predictions have 9 classes" in report
    Segmenter.load(labelled.run.uri).save_pretrained(tmp_path / "shared")
    card = ModelCard.load(tmp_path / "shared" / "README.md").text
    assert "| 0 | target |" in card
    assert "| 0 | both |\n" in card
    # Names alone: scores stand under them.
    naming.name_classes(labelled.run, {1: "bedding"}, say=lambda _: None)
    metrics = json.loads(Path(labelled.run.file("metrics.json")).read_text())
    assert list(metrics["iou"])[:2] == ["target", "bedding"]
    assert metrics["named"] is None


def test_the_command(bare: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([bare.run.uri])
    file = tmp_path / "names.yaml"
    file.write_text(capsys.readouterr().out.replace("concept 4", "sea").replace("concept 1", "sea"))
    before = Path(bare.run.file("metrics.json")).read_text()
    command.main([bare.run.uri, str(file)])
    assert "   1  sea  (concept 1, concept 4)" in capsys.readouterr().out
    command.main([bare.run.uri])
    assert capsys.readouterr().out == file.read_text()
    command.main([bare.run.uri, "--undo"])
    assert "concept 4" in capsys.readouterr().out
    assert Segmenter.load(bare.run.uri).classes[4] == "concept 4"
    again = json.loads(Path(bare.run.file("metrics.json")).read_text())
    assert {n: v for n, v in again.items() if n != "format"} == json.loads(before)
    for words, code in (
        ([bare.run.uri, str(file), "--undo"], "flags-conflict"),
        ([str(tmp_path / "none"), str(file)], "run-missing"),
    ):
        with pytest.raises(UserError) as caught:
            command.main(words)
        assert caught.value.code == code


def test_masks_are_exported_under_the_runs_names(
    bare: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    naming.name_classes(bare.run, {1: "cow", 3: "cow"})
    out = masks_of(bare, tmp_path / "some")
    words = ["--masks", str(out), "--images", str(out.parent / "images"), "--tolerance", "0", "--least", "0"]
    export.main([*words, "--to", "coco", "--classes", "cow", "--out", str(tmp_path / "there")])
    assert capsys.readouterr().out == f"exported: {tmp_path}/there/coco.json\n"
    tree = json.loads((tmp_path / "there" / "coco.json").read_text())
    assert [c["name"] for c in tree["categories"]] == ["cow"]
    assert [i["file_name"] for i in tree["images"]] == ["0.png", "1.png", "2.png"]
    assert sum(a["area"] for a in tree["annotations"]) == sum((mask == 1).sum() for mask in pixels(out))
    for more, code in (
        (["--to", "yolo"], "export-unknown"),
        (["--to", "coco", "--classes", "x"], "export-class-unknown"),
    ):
        with pytest.raises(UserError) as caught:
            export.main([*words, *more])
        assert caught.value.code == code


def test_class_names_of_ones_own_labels(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("sky\nroad\n")
    words = ["folder", "--data", str(tmp_path), "--things", "0", "--stuff", "3", "--groups", "all"]
    with pytest.raises(UserError) as caught:
        train.main([*words, "--class-names", str(file)])
    assert caught.value.code == "labels-missing"
    with pytest.raises(UserError) as caught:
        train.main([*words, "--labels", str(tmp_path), "--class-names", str(file)])
    assert caught.value.code == "names-count"


def test_scores_of_an_unmerged_run_are_those_that_evaluation_wrote(labelled: MadeRun) -> None:
    found = pipeline.scores_of(labelled.recipe, labelled.run)
    confusion = safetensors.numpy.load_file(labelled.run.artifact("evaluation").file("confusion.safetensors"))["model"]
    assert found["mean_iou"] == scores(confusion).mean_iou
    assert found["named"] is None
