"""The methods of comparison as whole runs: stages, files, prediction, report, and mistakes refused before Ray."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.baselines.learning import FIELDS
from tests.folder_run import IMAGES, SIDE, photographs, small
from tests.method_run import RANDOM, recipe_of, sizes_of
from tests.refusals import refused
from transfgu import Segmenter, pipeline
from transfgu.baselines.comparison import Scored, score_untrained
from transfgu.cli import train as command
from transfgu.errors import UserError
from transfgu.methods import METHODS, STAGES
from transfgu.recipe import ComputeRecipe, from_yaml, preset
from transfgu.report import page
from transfgu.runtime.progress import Progress
from transfgu.stages import prediction
from transfgu.stages.evaluation import check_decoder
from transfgu.stages.prediction import PredictionJob
from transfgu.store import storage
from transfgu.store.artifacts import Run
from transfgu.store.weights import read_weights
from transfgu.verification import verify

PHOTOGRAPHS = 20


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.ci_long if name == "picie-no-aux" else ()) for name in FIELDS],
)
def test_a_run_from_images_to_masks(method: str, tmp_path: Path, ray_cluster: None) -> None:
    photographs(tmp_path)
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    recipe = recipe_of(method, tmp_path, max_bad_share=0.5)
    run = Run(str(tmp_path / "run"))
    metrics = pipeline.run_stages(recipe, run, report=page.write, quiet=True)
    assert list(metrics["stages"]) == list(METHODS[method].stages)
    assert metrics["method"] == method
    assert 0 <= metrics["mean_iou"] <= 100
    if method != "token-kmeans":  # which sees a bad image in the same pass
        assert "bad" in {left["name"].rpartition("/")[2].partition(".")[0] for left in metrics["left_out"]}
    weights = read_weights(run.file("model.safetensors"))
    assert (weights.metadata["method"], weights.metadata["classes"]) == (method, "2")
    assert METHODS[method].title in storage.read_bytes(run.file("report.html")).decode()
    history = json.loads(storage.read_bytes(run.file("training/history.json")))
    assert [row["epoch"] for row in history] == [1]
    assert len(storage.list_files(run.file("tensorboard"))) == 1

    # The same command finds everything done; another method is refused there.
    again = pipeline.run_stages(recipe, run, quiet=True)
    assert all(stage["skipped"] for stage in again["stages"].values())
    other = "picie" if method == "iic" else "iic"
    with refused(f"run-of-another-method {method} {other}"):
        pipeline.run_stages(recipe_of(other, tmp_path, max_bad_share=0.5), run, quiet=True)

    # Whoever predicts by the run, or scores its model, does as its evaluation did.
    scored = pipeline.evaluate(run.recipe(), run, quiet=True)
    assert scored["mean_iou"] == metrics["mean_iou"]
    segmenter = Segmenter.load(run.uri, device="cpu")
    images = sorted((tmp_path / "images").glob("[0-9].png"))
    masks = segmenter.predict([str(image) for image in images])
    assert [mask.shape for mask in masks] == [(SIDE, SIDE)] * IMAGES
    job = PredictionJob(run=run.uri, images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    made = prediction.predict(job, ComputeRecipe(), Progress("prediction", quiet=True))
    assert (made.made, len(made.left_out)) == (IMAGES, 1)
    for image, mask in zip(images, masks, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "masks" / image.name)), mask)

    # A model that is shared predicts the same, and tells nobody where its data lay.
    segmenter.save_pretrained(tmp_path / "shared")
    assert str(tmp_path) not in (tmp_path / "shared" / "recipe.yaml").read_text()
    assert METHODS[method].title in (tmp_path / "shared" / "README.md").read_text()
    shared = Segmenter.load(tmp_path / "shared", device="cpu").predict(str(images[0]))
    np.testing.assert_array_equal(shared, masks[0])


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("method", FIELDS)
def test_photographs_of_coco_from_disk_and_from_s3(
    method: str, samples: Path, s3: str, tmp_path: Path, ray_cluster: None
) -> None:
    """One epoch from random weights; a run that reads from and writes to S3 has the same scores."""
    for split in ("train2017", "val2017"):
        for kind in ("images", "annotations"):
            for file in sorted((samples / "coco" / kind / split).iterdir())[:PHOTOGRAPHS]:
                storage.write_bytes(f"{s3}/coco/{kind}/{split}/{file.name}", file.read_bytes())
    scores = []
    for data, folder in ((str(samples / "coco"), str(tmp_path / "run")), (f"{s3}/coco", f"{s3}/run")):
        recipe = preset("coco-stuff-27", method).with_fields(
            {"data": data, "limit": PHOTOGRAPHS, "encoder.weights": "random", **RANDOM, **sizes_of(method)}
        )
        metrics = pipeline.run_stages(recipe, Run(folder), report=page.write, quiet=True)
        assert metrics["stages"]["samples"]["items"] == 2 * PHOTOGRAPHS
        scores.append((metrics["mean_iou"], metrics["pixel_accuracy"]))
    assert 0 < scores[0][1] <= 100
    assert scores[1] == scores[0]
    image = next((samples / "coco" / "images" / "val2017").iterdir())
    assert Segmenter.load(f"{s3}/run").predict(str(image)).ndim == 2


@pytest.mark.ray
@pytest.mark.long
def test_the_untrained_network_is_scored_once_and_kept(tmp_path: Path, ray_cluster: None) -> None:
    photographs(tmp_path)
    run = Run(str(tmp_path / "run"))
    metrics = pipeline.run_stages(recipe_of("picie-no-aux", tmp_path), run, quiet=True)
    row = Scored(method="picie-no-aux", seed=1, run=run.uri, mean_iou=metrics["mean_iou"], pixel_accuracy=1.0)
    other = Scored(method="token-kmeans", seed=1, run="/nowhere", mean_iou=1.0, pixel_accuracy=1.0)
    failed = Scored(method="iic", seed=1, run="/nowhere", failure="no images")
    lines: list[str] = []
    scored, *rest = score_untrained([row, other, failed], lines.append, quiet=True)
    assert rest == [other, failed]
    assert scored.untrained_pixel_accuracy is not None
    assert 0 < scored.untrained_pixel_accuracy <= 100
    assert len(lines) == 1
    assert score_untrained([row], lines.append) == [scored]
    assert len(lines) == 1
    assert verify(run).damage == ()


# ---- the recipe and the command line


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["shapes", "coco-stuff-27", "cityscapes", "pascal-voc", "lip-16", "folder"])
def test_a_recipe_is_read_as_it_was_written(method: str, name: str) -> None:
    recipe = preset(name, method)
    assert recipe.method == method
    assert from_yaml(recipe.to_yaml()) == recipe
    assert recipe.given() == (set() if method == "transfgu" else {"method"})
    assert recipe.stages == tuple(stage for stage in STAGES if stage in METHODS[method].stages)


def test_a_method_counts_in_the_digest_of_its_own_runs_alone() -> None:
    """TransFGU's digests are the same as before there were other methods; see the golden run."""
    digests = {method: preset("shapes", method).digest("training") for method in METHODS}
    assert len(set(digests.values())) == len(METHODS)
    assert preset("shapes").with_fields({"iic.half_side": 3}).digest("training") == digests["transfgu"]
    iic = preset("shapes", "iic")
    assert iic.with_fields({"omega_1": 3}).digest("training") == digests["iic"]
    assert iic.with_fields({"iic.half_side": 3}).digest("training") != digests["iic"]
    samples = {preset("shapes", method).digest("samples") for method in METHODS}
    assert len(samples) == 1


def mistake_of(words: list[str]) -> UserError:
    with pytest.raises(UserError) as told:
        command.main(words)
    assert "\n" not in str(told.value)
    return told.value


@pytest.mark.usefixtures("no_ray")
def test_bad_requests_are_one_line_each(tmp_path: Path) -> None:
    photographs(tmp_path)
    run, data = ["--run", str(tmp_path / "run")], ["--data", str(tmp_path / "images")]
    error = mistake_of(["shapes", "--method", "picei", *run])
    assert error.code == "method-unknown"
    assert "picie" in str(error)
    error = mistake_of(["shapes", "--method", "iic", "--omega_1", "3", *run])
    assert error.code == "option-of-another-method"
    assert "--training.omega_1" in str(error)
    assert mistake_of(["shapes", "--half_side", "3", *run]).code == "option-of-another-method"
    assert mistake_of(["shapes", "--method", "token-kmeans", "--epochs", "3", *run]).code == "option-of-another-method"
    assert mistake_of(["shapes", "--method", "iic", "--until", "features", *run]).code == "stage-unknown"
    no_network = ["folder", "--method", "picie", "--picie.backbone", "vgg16", *data, *run]
    assert "resnet18" in str(mistake_of(no_network))
    mask = ["folder", "--method", "maskcontrast", "--maskcontrast.weights", "random", *data, *run]
    small(tmp_path)
    mask += ["--maskcontrast.backbone", "resnet18", "--encoder.name", "tiny"]
    mask += ["--encoder.weights", str(tmp_path / "encoder.safetensors"), "--image_size", "64x64"]
    assert mistake_of([*mask, "--saliency_factor", "1000"]).code == "objects-missing"
    assert mistake_of([*mask, "--object_masks", str(tmp_path / "gone")]).code != "objects-missing"
    few = tmp_path / "few"
    few.mkdir()
    Image.fromarray(np.ones((SIDE, SIDE), np.uint8)).save(few / "0.png")
    assert mistake_of([*mask, "--object_masks", str(few)]).code == "masks-missing"


def test_the_help_shows_the_flags_of_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> str:
        with pytest.raises(SystemExit):
            command.main([*words, "--help-all"])
        return capsys.readouterr().out

    own, iic = shown(), shown("--method", "iic")
    assert "--training.omega_1" in own
    assert "--iic.half_side" not in own
    assert "--training.omega_1" not in iic
    assert "--iic.half_side" in iic
    assert "--picie.width" not in iic


def test_a_model_of_another_method_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, file, {"method": "iic", "classes": "10"})
    check_decoder(preset("shapes", "iic"), str(file))
    for recipe, code in (
        (preset("shapes"), "model-of-another-method"),
        (preset("coco-stuff-27", "iic"), "model-of-other-classes"),
    ):
        with pytest.raises(UserError) as told:
            check_decoder(recipe, str(file))
        assert told.value.code == code
