"""Whole runs from object storage to object storage, and mistakes about it, reported before work starts."""

import io
import json
import os
from pathlib import Path

import pytest
import torch

from tests.gateway import Gateway
from tests.refusals import refused
from tests.store.test_storage import faults
from transfgu import pipeline
from transfgu.encoder import Encoder
from transfgu.methods import STAGES
from transfgu.recipe import Recipe, preset
from transfgu.segmenter import Segmenter
from transfgu.store import storage
from transfgu.store.artifacts import Run

__all__ = ["faults"]  # the fixture

pytestmark = pytest.mark.s3

ENCODER = "vit_tiny_patch16_224"
# The samples' images and labels, the official folders of each preset; JSONs of instances would name many more.
FILES = {
    "coco-stuff-27": [
        f"coco/{kind}/{split}2017/*.*g" for split in ("train", "val") for kind in ("images", "annotations")
    ],
    "cityscapes": [
        f"cityscapes/{kind}.png"
        for split in ("train", "val")
        for kind in (f"leftImg8bit/{split}/*/*", f"gtFine/{split}/*/*_labelIds")
    ],
}
IMAGES = {"coco-stuff-27": 4, "cityscapes": 2}


def upload(name: str, samples: Path, uri: str) -> str:
    """A preset's first images and labels of each split."""
    for pattern in FILES[name]:
        for path in sorted(samples.glob(pattern))[: IMAGES[name]]:
            storage.write_bytes(storage.join(uri, str(path.relative_to(samples))), path.read_bytes())
    return storage.join(uri, FILES[name][0].partition("/")[0])


def small(name: str, data: str, weights: str) -> Recipe:
    """A preset with small images, so that a run takes little more than starting its processes."""
    sizes = {"image_size": (64, 64), "feature_size": (128, 128), "training_size": (64, 64), "windows.size": (64, 64)}
    if name == "cityscapes":
        sizes |= {"image_size": (64, 128), "feature_size": (128, 256), "training_size": (64, 128)}
    fields = {"data": data, "encoder.name": ENCODER, "encoder.weights": weights, "epochs": 1, "passes": 1, "limit": 4}
    return preset(name).with_fields({**fields, **sizes, "windows.scales": (0.5,), "min_background": 0.3})


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(
    "name",
    [pytest.param("coco-stuff-27", marks=pytest.mark.ci_long), "cityscapes"],
)
def test_data_weights_and_run_lie_on_s3(name: str, samples: Path, s3: str, ray_cluster: None) -> None:
    data = upload(name, samples, f"{s3}/data")
    sink = io.BytesIO()
    state = Encoder.from_pretrained(ENCODER, "random").vit.state_dict()
    torch.save({"teacher": {f"backbone.{key}": tensor for key, tensor in state.items()}}, sink)
    storage.write_bytes(f"{s3}/weights/vit.pth", sink.getvalue())
    recipe, run = small(name, data, f"{s3}/weights/vit.pth"), Run(f"{s3}/runs/one")

    metrics = pipeline.run_stages(recipe, run, quiet=True)

    assert metrics == json.loads(storage.read_bytes(run.file("metrics.json")))
    assert set(metrics["stages"]) == set(STAGES)
    assert metrics["stages"]["features"]["items"] == IMAGES[name]
    assert 0 < metrics["pixel_accuracy"] <= 100
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    for file in storage.list_files(run.uri):
        assert secret not in storage.read_bytes(file), file
    again = pipeline.run_stages(recipe, run, quiet=True)
    assert all(stage["skipped"] for stage in again["stages"].values())
    image = next(samples.glob(FILES[name][0]))
    assert Segmenter.load(run.uri).predict(str(image)).ndim == 2


def check_refused(recipe: Recipe, run: str, refusal: str) -> None:
    with refused(refusal) as caught:
        pipeline.run_stages(recipe, Run(run), quiet=True)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


@pytest.mark.usefixtures("no_ray")
def test_buckets_and_files_that_are_not_there(s3: str) -> None:
    storage.write_bytes(f"{s3}/data/1.jpg", b"x")
    recipe = preset("folder").with_fields({"data": f"{s3}/data", "encoder.name": ENCODER, "encoder.weights": "random"})
    absent = "s3://transfgu-absent-bucket/x"
    for given, run in ((recipe.with_fields({"data": absent}), f"{s3}/run"), (recipe, absent)):
        check_refused(given, run, f"bucket-missing transfgu-absent-bucket {absent} http")
    weights = f"{s3}/weights/none.pth"
    check_refused(recipe.with_fields({"encoder.weights": weights}), f"{s3}/run", f"file-missing {weights}")


@pytest.mark.usefixtures("no_ray")
def test_a_denied_key_ends_it_at_once(s3: str, faults: Gateway) -> None:
    recipe = preset("folder").with_fields({"data": f"{s3}/data", "encoder.name": ENCODER, "encoder.weights": "random"})
    faults.pending = [403] * 9
    check_refused(recipe, f"{s3}/run", f"storage-failed {s3}/data http denied permissions")
    assert faults.met <= 2


@pytest.mark.s3_server
@pytest.mark.usefixtures("no_ray")
def test_keys_that_a_real_server_refuses(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3}/data/1.jpg", b"x")
    recipe = preset("folder").with_fields({"data": f"{s3}/data", "encoder.name": ENCODER, "encoder.weights": "random"})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "not-the-one")
            check_refused(recipe, f"{s3}/run", f"storage-failed {s3}/data http check")
