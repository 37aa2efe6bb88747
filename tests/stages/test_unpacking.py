"""Images inside Parquet files and tar shards are, once unpacked, the same samples as image files."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.folder_run import IMAGES, pack, photographs
from tests.refusals import refused
from transfgu.errors import LeftOut
from transfgu.recipe import Recipe, preset
from transfgu.runtime.progress import Progress
from transfgu.stages import samples
from transfgu.store.artifacts import Run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The images as files, in one shard, and in row groups of four."""
    photographs(tmp_path)
    pack(tmp_path)
    return tmp_path


def recipe_of(data: Path, **fields: object) -> Recipe:
    return preset("folder").with_fields({"things": 2, "stuff": 2, "data": str(data), **fields})


def listed(recipe: Recipe, run: Run) -> list[bytes]:
    """Return the contents of the training samples, in order."""
    outcome = samples.run(recipe, run, Progress("samples", quiet=True))
    artifact = run.artifact("samples")
    artifact.begin(recipe)
    artifact.commit(recipe, outcome, 0.0)
    return contents(run)


def contents(run: Run, split: str = "train") -> list[bytes]:
    return [Path(uri).read_bytes() for uri in samples.load(run, split)["image"].to_pylist()]


@pytest.mark.usefixtures("no_ray")
def test_the_samples_are_those_of_the_files(data: Path) -> None:
    wanted = listed(recipe_of(data / "images"), Run(str(data / "as files")))
    assert len(wanted) == IMAGES
    for kind in ("shard.tar", "rows", "rows/0.parquet"):
        run = Run(str(data / f"run {kind.replace('/', ' ')}"))
        assert listed(recipe_of(data / kind), run) == wanted
        assert contents(run, "validation") == wanted
    names = samples.load(run, "train")["name"].to_pylist()
    assert names == [f"0/0000000{i}.png" for i in range(IMAGES)]


@pytest.mark.usefixtures("no_ray")
def test_an_interrupted_attempt_is_gone_on_with(data: Path) -> None:
    run = Run(str(data / "run"))
    first = listed(recipe_of(data / "rows"), run)
    records = sorted((data / "run" / "samples" / "unpacked").iterdir())
    assert [record.name for record in records] == ["0-000000.json", "0-000001.json"]
    records[1].unlink()
    images = data / "run" / "samples" / "images" / "0"
    (images / "00000005.png").unlink()  # of the unit that was in hand
    kept = (images / "00000000.png").stat().st_mtime_ns
    assert listed(recipe_of(data / "rows"), run) == first
    assert (images / "00000000.png").stat().st_mtime_ns == kept


@pytest.mark.usefixtures("no_ray")
def test_a_moved_run_finds_its_images(data: Path) -> None:
    run = Run(str(data / "run"))
    wanted = listed(recipe_of(data / "shard.tar"), run)
    shutil.move(run.uri, data / "moved")
    assert contents(Run(str(data / "moved"))) == wanted


@pytest.mark.usefixtures("no_ray")
def test_rows_without_an_image_are_left_out(data: Path) -> None:
    rows = pq.read_table(data / "rows" / "0.parquet")["image"].to_pylist()
    pq.write_table(pa.table({"image": [rows[0], None, *rows[1:]]}), data / "rows" / "0.parquet")
    recipe = recipe_of(data / "rows", max_bad_share=0.2)
    outcome = samples.run(recipe, Run(str(data / "run")), Progress("samples", quiet=True))
    assert outcome.left_out == (LeftOut(name="0/00000001", reason="missing image"),)
    assert outcome.details["train images"] == IMAGES
    record = json.loads((data / "run" / "samples" / "unpacked" / "0-000000.json").read_text())
    assert len(record["left_out"]) == 1
    with refused("images-bad 0/00000001"):
        samples.run(recipe_of(data / "rows", max_bad_share=0.1), Run(str(data / "other")), Progress("x", quiet=True))


@pytest.mark.usefixtures("no_ray")
def test_image_files_win_and_nothing_is_still_a_mistake(data: Path) -> None:
    shutil.copy(data / "shard.tar", data / "images" / "x.tar")
    listings, units = samples.listed(recipe_of(data / "images"))
    assert (len(listings["train"].table), units) == (IMAGES, [])
    (data / "text").mkdir()
    (data / "text" / "a.txt").write_text("no image")
    with refused("images-missing text"):
        samples.listed(recipe_of(data / "text"))
