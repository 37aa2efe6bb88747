"""What is wrong with object storage is said before work starts."""

import os

import pytest

from tests.test_storage import Faults, faults
from transfgu import pipeline, storage
from transfgu.artifacts import Run
from transfgu.errors import UserError
from transfgu.recipe import Recipe, preset

__all__ = ["faults"]  # the fixture

pytestmark = pytest.mark.s3

ENCODER = "vit_tiny_patch16_224"


def refusal(recipe: Recipe, run: str) -> str:
    with pytest.raises(UserError) as caught:
        pipeline.run_stages(recipe, Run(run), quiet=True)
    message = str(caught.value)
    assert "\n" not in message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message
    return message


@pytest.mark.usefixtures("no_ray")
def test_buckets_and_files_that_are_not_there(s3: str) -> None:
    storage.write_bytes(f"{s3}/data/1.jpg", b"x")
    recipe = preset("folder").with_fields({"data": f"{s3}/data", "encoder.name": ENCODER, "encoder.weights": "random"})
    absent = "s3://transfgu-absent-bucket/x"
    for found in (refusal(recipe.with_fields({"data": absent}), f"{s3}/run"), refusal(recipe, absent)):
        assert found.startswith(f"there is no bucket transfgu-absent-bucket for {absent} at http://")
    weights = f"{s3}/weights/none.pth"
    assert refusal(recipe.with_fields({"encoder.weights": weights}), f"{s3}/run") == (
        f"there is no file {weights}: check the path"
    )


@pytest.mark.usefixtures("no_ray")
def test_a_denied_key_ends_it_at_once(s3: str, faults: Faults) -> None:
    recipe = preset("folder").with_fields({"data": f"{s3}/data", "encoder.name": ENCODER, "encoder.weights": "random"})
    faults.pending = [403] * 9
    found = refusal(recipe, f"{s3}/run")
    assert found.startswith(f"can't read {s3}/data at http://")
    assert found.endswith("access is denied: check the key's permissions for this bucket")
    assert faults.met <= 2


@pytest.mark.s3_server
@pytest.mark.usefixtures("no_ray")
def test_keys_that_a_real_server_refuses(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3}/data/1.jpg", b"x")
    recipe = preset("folder").with_fields({"data": f"{s3}/data", "encoder.name": ENCODER, "encoder.weights": "random"})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "not-the-one")
            found = refusal(recipe, f"{s3}/run")
            assert found.startswith(f"can't read {s3}/data at http://")
            assert "check" in found.rpartition(": ")[2] or "denied" in found
