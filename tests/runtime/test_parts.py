"""Parts: how they are made, when they are complete, when bad images end a run. Tests of stages run them on Ray."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from tests.refusals import refused
from tests.stages.small_run import BAD, recipe_of, write_run
from transfgu.datasets import images
from transfgu.errors import LeftOut, UserError
from transfgu.runtime import parts
from transfgu.runtime.parts import ReadImages, Summary
from transfgu.runtime.progress import Progress
from transfgu.stages import samples

PROGRESS = Progress("parts", quiet=True)
SIZE = (40, 24)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Five samples, of which the second and the third are bad."""
    return samples.load(write_run(tmp_path_factory.mktemp("parts"), [2, 3, 40, 4, 5]), "train")


def write(folder: Path, listed: pa.Table, part: int, size: int, bad: Sequence[LeftOut] = ()) -> None:
    count = len(listed.slice(part, size))
    summary = Summary(part=part, images=count, left_out=tuple(bad), counts={"windows": 3})
    parts.write_part(str(folder), summary, pa.table({"index": range(count)}), "")


def no_plan(missing: Sequence[pa.Table]) -> ray.data.Dataset:
    raise AssertionError(f"{len(missing)} parts would have been made")


def test_parts_are_of_twenty_megabytes_and_of_32_images_at_most() -> None:
    assert [parts.part_size(s) for s in ((128, 128), (640, 640), (640, 1280), (9000, 9000))] == [32, 16, 8, 1]


def test_parts_are_consecutive_and_complete(listed: pa.Table) -> None:
    assert [part["index"].to_pylist() for part in parts.split(listed, 2)] == [[0, 1], [2, 3], [4]]


def test_summary_travels_as_json() -> None:
    summary = Summary(part=64, images=32, left_out=(LeftOut(name="ä", reason="empty image"),), counts={"all": 7})
    assert Summary.from_json(summary.to_json()) == summary
    assert summary.file == "part-00000064.parquet"


def test_reading_keeps_bad_images_in_their_place_with_the_reason(listed: pa.Table) -> None:
    block = ReadImages(size=SIZE, interpolation="bilinear")(listed)
    assert block["reason"].to_pylist() == [None, BAD[3], BAD[40], None, None]
    assert block["part"].to_pylist() == [0] * 5
    assert block.schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), (3, *SIZE))
    rows, pixels = parts.usable(block)
    assert rows["index"].to_pylist() == [0, 3, 4]
    for uri, image in zip(listed["image"].take([0, 3, 4]).to_pylist(), pixels, strict=True):
        assert np.array_equal(image, images.resize(images.read_image(uri), SIZE))
    assert [x.name for x in parts.left_out(block)] == ["picture 003", "picture 040"]


def test_images_are_not_copied_where_all_are_good(listed: pa.Table) -> None:
    block = ReadImages(size=SIZE, interpolation="nearest")(listed.take([0, 3]))
    _, pixels = parts.usable(block)
    stored = block["image"].chunk(0).storage.values.buffers()[1]
    assert pixels.__array_interface__["data"][0] == stored.address


def test_complete_parts_are_not_made_again(tmp_path: Path, listed: pa.Table) -> None:
    bad = LeftOut(name="picture 003", reason="truncated image")
    for part in (0, 2, 4):
        write(tmp_path, listed, part, 2, [bad] if part == 0 else [])
    recipe = recipe_of(tmp_path)
    summaries, work = parts.complete(recipe, listed, str(tmp_path), 2, no_plan, PROGRESS)
    assert [(s.part, s.images, s.left_out) for s in summaries] == [(0, 2, (bad,)), (2, 2, ()), (4, 1, ())]
    assert all(s.counts == {"windows": 3} for s in summaries)
    assert work == {}


def test_a_damaged_or_foreign_part_is_made_again(tmp_path: Path, listed: pa.Table) -> None:
    for part in (0, 2, 4):
        write(tmp_path, listed, part, 2)
    first, second = (tmp_path / parts.part_file(part) for part in (0, 2))
    first.write_bytes(first.read_bytes()[:-9])
    pq.write_table(pq.read_table(second).replace_schema_metadata(None), second)
    write(tmp_path, listed, 4, 1, [])
    (tmp_path / parts.part_file(4)).rename(tmp_path / "part-00000004.parquet")
    asked: list[list[int]] = []

    def plan(missing: Sequence[pa.Table]) -> ray.data.Dataset:
        asked.extend(part["index"].to_pylist() for part in missing)
        raise UserError("enough", code="images-bad")

    with refused("images-bad"):
        parts.complete(recipe_of(tmp_path), listed, str(tmp_path), 2, plan, PROGRESS)
    assert asked == [[0, 1], [2, 3]]


def test_too_many_bad_images_end_the_run_in_one_line(tmp_path: Path, listed: pa.Table) -> None:
    bad = [LeftOut(name=f"picture {n:03d}", reason=BAD[n]) for n in (3, 40)]
    write(tmp_path, listed, 0, 5, bad)
    with pytest.raises(UserError) as caught:
        parts.complete(recipe_of(tmp_path, max_bad_share=0.39), listed, str(tmp_path), 5, no_plan, PROGRESS)
    assert str(caught.value) == (
        "at least 2 of 5 images (40%) can't be used, such as picture 003 (truncated image), picture 040 (missing "
        "image): correct or remove them, or raise --dataset.max_bad_share from 0.39"
    )
    at_the_limit = recipe_of(tmp_path, max_bad_share=0.4)
    assert len(parts.complete(at_the_limit, listed, str(tmp_path), 5, no_plan, PROGRESS)[0]) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_users_mistake_in_a_task_arrives_as_one_line(tmp_path: Path, listed: pa.Table) -> None:
    elsewhere = listed.set_column(2, "image", pa.array(["nowhere://x/y.png"] * len(listed)))

    def plan(missing: Sequence[pa.Table]) -> ray.data.Dataset:
        data = ray.data.from_arrow(list(missing))
        data.context.raise_original_map_exception = True
        return parts.written(data, ReadImages(size=SIZE, interpolation="bilinear"))

    with refused("uri-invalid nowhere"):
        parts.complete(recipe_of(tmp_path), elsewhere, str(tmp_path), 2, plan, PROGRESS)
