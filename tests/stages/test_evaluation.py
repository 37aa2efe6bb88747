import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image

from tests.made_run import SIDE, MadeRun, make_run
from tests.refusals import refused
from transfgu import pipeline
from transfgu.datasets import images
from transfgu.datasets.rows import read_labelled_rows
from transfgu.decoder import MaskDecoder
from transfgu.encoder import Encoder, normalise
from transfgu.metrics import scores
from transfgu.recipe import Recipe
from transfgu.runtime import connect as runtime
from transfgu.runtime.progress import Progress
from transfgu.stages import evaluation, samples
from transfgu.store import storage

QUIET = Progress("evaluation", quiet=True)


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    made = make_run(tmp_path)
    torch.manual_seed(7)
    last = MaskDecoder(24, 10, num_heads=3)
    safetensors.torch.save_file(last.state_dict(), made.run.file("training/last.safetensors"))
    return made


def counted(recipe: Recipe, made: MadeRun, weights: str, names: list[str], *, own_size: bool) -> np.ndarray:
    """Compute the confusion matrix one image and one class at a time."""
    encoder = Encoder.from_pretrained(recipe.encoder.name, recipe.encoder.weights)
    decoder = MaskDecoder.from_state_dict(safetensors.torch.load_file(weights), num_heads=3)
    matrix = np.zeros((10, 10), np.int64)
    for row in pq.read_table(made.run.file("samples/validation.parquet")).to_pylist():
        if row["name"] not in names:
            continue
        label = np.asarray(Image.open(row["label"]))
        pixels = images.resize(np.asarray(Image.open(row["image"])), (SIDE, SIDE))
        if not own_size:
            label = label[np.arange(SIDE) * len(label) // SIDE]
        with torch.no_grad():
            logits = decoder(encoder.patch_tokens(normalise(torch.from_numpy(pixels)[None])))[0]
        logits = logits[0].T.reshape(1, 10, SIDE // 8, SIDE // 8)
        predicted = torch.nn.functional.interpolate(logits, label.shape, mode="bilinear")[0].argmax(0).numpy()
        for true in range(10):
            for cluster in range(10):
                matrix[true, cluster] += ((label == true) & (predicted == cluster)).sum()
    return matrix


def counted_here(recipe: Recipe, decoders: dict[str, str], made: MadeRun) -> dict[str, np.ndarray]:
    """Return the counts of the stage's reader and actor for all images, without Ray."""
    rows = samples.labelled(recipe, made.run)
    batch = read_labelled_rows(rows, recipe=recipe, protocol=recipe.evaluation.protocol)
    counts = evaluation.Count(recipe, list(decoders.values()), 1)(batch)
    assert counts["images"] == [5]
    return dict(zip(decoders, counts["confusions"][0], strict=True))


@pytest.mark.ray
def test_counts_are_those_of_one_process(made: MadeRun, ray_cluster: None) -> None:
    # One label of five can't be used: it is named, and the others are counted.
    Path(pq.read_table(made.run.file("samples/validation.parquet"))["label"][3].as_py()).write_bytes(b"gone bad")
    recipe = made.recipe.with_fields({"evaluation.batch_size": 2, "max_bad_share": 0.2})
    outcome = evaluation.run(recipe, made.run, QUIET)
    assert outcome.items == 4
    assert [(x.name, x.reason) for x in outcome.left_out] == [("scene <3>", "unreadable label")]

    confusions = safetensors.numpy.load(storage.read_bytes(made.run.file("evaluation/confusion.safetensors")))
    names = [f"scene <{i}>" for i in (0, 1, 2, 4)]
    model = counted(recipe, made, made.run.file("model.safetensors"), names, own_size=False)
    last = counted(recipe, made, made.run.file("training/last.safetensors"), names, own_size=False)
    np.testing.assert_array_equal(confusions["model"], model)
    np.testing.assert_array_equal(confusions["last"], last)
    assert (model != last).any()

    shown = json.loads(storage.read_bytes(made.run.file("evaluation/scores.json")))
    wanted = scores(model)
    assert shown["mean_iou"] == pytest.approx(wanted.mean_iou)
    assert shown["pixel_accuracy"] == pytest.approx(wanted.pixel_accuracy)
    assert shown["assignment"] == wanted.clusters.tolist()
    assert [np.nan if x is None else x for x in shown["iou"]] == pytest.approx(wanted.iou.tolist(), nan_ok=True)
    assert shown["last"]["mean_iou"] == pytest.approx(scores(last).mean_iou)


@pytest.mark.ray
def test_one_block_is_counted_here_as_by_ray(made: MadeRun, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = made.recipe.with_fields({"evaluation.batch_size": 2})
    by_ray = evaluation.run(recipe, made.run, QUIET)
    file = Path(made.run.file("evaluation/confusion.safetensors"))
    wanted = safetensors.numpy.load(file.read_bytes())
    file.unlink()
    monkeypatch.setattr(runtime, "works_here", lambda: True)
    monkeypatch.setattr(evaluation, "plan", lambda *_: pytest.fail("Ray was asked"))
    here = evaluation.run(recipe, made.run, QUIET)
    assert (here.items, here.left_out) == (by_ray.items, by_ray.left_out) == (5, ())
    found = safetensors.numpy.load(file.read_bytes())
    for name, confusion in wanted.items():
        np.testing.assert_array_equal(found[name], confusion)


@pytest.mark.usefixtures("without_ray")
def test_few_images_are_scored_without_ray(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = pipeline.evaluate(made.recipe, made.run, quiet=True)
    names = [f"scene <{i}>" for i in range(5)]
    model = counted(made.recipe, made, made.run.file("model.safetensors"), names, own_size=False)
    assert shown["images"] == 5
    assert shown["mean_iou"] == pytest.approx(scores(model).mean_iou)
    # Two images more than a task reads are Ray's.
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", 3)
    with pytest.raises(pytest.fail.Exception):
        pipeline.evaluate(made.recipe, made.run, quiet=True)


def test_labels_own_resolution(made: MadeRun) -> None:
    recipe = made.recipe.with_fields({"evaluation.protocol": "label"})
    model = made.run.file("model.safetensors")
    found = counted_here(recipe, {"it": model}, made)["it"]
    names = [f"scene <{i}>" for i in range(5)]
    np.testing.assert_array_equal(found, counted(recipe, made, model, names, own_size=True))
    assert found.sum() == 4 * SIDE * SIDE + SIDE * SIDE // 2  # one is half as high


def test_stego_s_protocol_counts_the_centre(made: MadeRun) -> None:
    recipe = made.recipe.with_fields({"evaluation.protocol": "stego"})
    model = made.run.file("model.safetensors")
    found = counted_here(recipe, {"it": model}, made)["it"]
    names = [f"scene <{i}>" for i in (0, 2, 3, 4)]
    square = counted(recipe, made, model, names, own_size=False)  # nothing is cut off these
    assert (found - square).min() >= 0
    # The one that is half as high is enlarged to twice its size, and half of it is cut off.
    row = pq.read_table(made.run.file("samples/validation.parquet")).to_pylist()[1]
    label = np.asarray(Image.open(row["label"])).repeat(2, 0).repeat(2, 1)[:, SIDE // 2 : SIDE // 2 + SIDE]
    np.testing.assert_array_equal((found - square).sum(1), np.bincount(label.ravel(), minlength=256)[:10])


def test_published_decoder_files(made: MadeRun, tmp_path: Path) -> None:
    model = made.run.file("model.safetensors")
    state = safetensors.torch.load_file(model)
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    decoders = {"ours": model}
    for form, saved in {"bare": state, "module": prefixed, "model": {"model": state}}.items():
        decoders[form] = str(tmp_path / f"{form}_decoder.pt")
        torch.save(saved, decoders[form])
        evaluation.check_decoder(made.recipe, decoders[form])
    found = counted_here(made.recipe, decoders, made)
    assert found["ours"].any()
    for form in decoders:
        np.testing.assert_array_equal(found[form], found["ours"])


def test_a_decoder_file_that_would_run_code_is_refused(made: MadeRun, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"cls_emb": Payload()}, tmp_path / "it_decoder.pt")
    with refused("weights-unsafe"):
        evaluation.check_decoder(made.recipe, str(tmp_path / "it_decoder.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.ray
def test_too_many_bad_labels_end_it(made: MadeRun, ray_cluster: None) -> None:
    Path(pq.read_table(made.run.file("samples/validation.parquet"))["label"][3].as_py()).write_bytes(b"gone bad")
    with refused("images-bad 1 5 <3>"):
        evaluation.run(made.recipe, made.run, QUIET)


def test_without_labels_there_are_no_scores(tmp_path: Path) -> None:
    made = make_run(tmp_path, labels=False)
    assert evaluation.run(made.recipe, made.run, QUIET).items == 0
    shown = json.loads(storage.read_bytes(made.run.file("evaluation/scores.json")))
    assert shown == {"format": 2, "mean_iou": None, "pixel_accuracy": None, "iou": None, "assignment": None}


def test_a_decoder_of_other_classes_is_refused(made: MadeRun, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(MaskDecoder(24, 7, num_heads=3).state_dict(), other)
    recipe = made.recipe.with_fields({"decoder.weights": str(other)})
    with refused("classes-mismatch other.safetensors 7 10"):
        evaluation.run(recipe, made.run, QUIET)


def test_a_decoder_for_another_encoder_is_refused(made: MadeRun, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(MaskDecoder(24, 10, num_heads=3, patch_width=48).state_dict(), other)
    with refused("model-mismatch 48 24"):
        evaluation.Count(made.recipe, [str(other)], 1)
