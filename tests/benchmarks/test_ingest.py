"""What ingest costs: files read per sample, counted in the process and at an S3 server; speed is not tested."""

from pathlib import Path

import pytest

from tests.gateway import Gateway
from tests.store.test_storage import faults
from tests.training.test_batches import cached
from tests.made_run import TRAIN, make_run
from transfgu.benchmarks import ingest
from transfgu.datasets import map_files
from transfgu.recipe import preset
from transfgu.stages.training import training_images
from transfgu.store import storage

__all__ = ["faults"]  # the fixture

IMAGES = 70  # three parts: 32, 32 and 6


def test_the_first_epoch_reads_each_file_once_and_later_ones_none(tmp_path: Path) -> None:
    recipe = preset("coco-stuff-27").with_fields(
        {"image_size": (32, 32), "training_size": (32, 32), "compute.cache_folder": str(tmp_path)}
    )
    found = ingest.measure(recipe, IMAGES)
    assert found.first_epoch_requests_per_sample == (IMAGES + 3) / IMAGES
    assert found.requests_per_sample == 0
    assert found.bytes_per_sample == 3 * 32 * 32 + 2 * 29 * 4 * 4
    assert found.samples_per_second_per_core > 0
    assert f'"images": {IMAGES}' in found.to_json()


@pytest.mark.s3
def test_requests_at_the_server(s3: str, faults: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, size = make_run(tmp_path), (32, 32)
    recipe = made.recipe.with_fields({"image_size": size, "training_size": size})
    rows = ingest._rows(recipe, IMAGES, tmp_path / "ingest")
    local = sorted(set(rows["part"].to_pylist()))
    folder = f"{s3}/pseudo_labels"
    for uri in [*local, str(Path(local[0]).parent / map_files.INDEX)]:
        storage.write_bytes(f"{folder}/{Path(uri).name}", Path(uri).read_bytes())
    parts = [f"{folder}/{Path(uri).name}" for uri in local]
    faults.asked.clear()
    index = map_files.index_maps(parts)
    assert len(faults.asked) == 1  # for any number of parts: one small index
    assert index["index"].to_pylist() == list(range(IMAGES))
    faults.asked.clear()
    some = map_files.read_maps(index.take([40, 3]))
    assert len(faults.asked) == 2  # a range of each part
    assert (map_files.read_maps(rows.take([40, 3])) == some).all()
