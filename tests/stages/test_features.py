"""The feature stage on a real local Ray: against the encoder's own methods, and against itself in other runs."""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from tests.refusals import refused
from tests.stages.small_run import BAD, IMAGES, SIDE, recipe_of, write_run
from transfgu.datasets import images
from transfgu.encoder import Encoder, normalise
from transfgu.errors import LeftOut
from transfgu.recipe import Recipe
from transfgu.runtime import capacity, parts
from transfgu.runtime.progress import Progress
from transfgu.stages import features, samples
from transfgu.stages.features import EncodeWindows, WriteFeatures
from transfgu.store.artifacts import Outcome, Run
from transfgu.windows import crop_windows, select_windows, sliding_windows

PROGRESS = Progress("features", quiet=True)
PLACE = ["y0", "y1", "x0", "x1"]


class Made(NamedTuple):
    folder: Path
    recipe: Recipe
    run: Run
    outcome: Outcome

    @property
    def files(self) -> list[Path]:
        return sorted(Path(self.run.artifact("features").uri).glob("*"))

    @property
    def table(self) -> pa.Table:
        return pa.concat_tables(pq.read_table(f) for f in self.files)


@pytest.fixture(scope="module")
def made(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The whole stage with one actor, on 70 pictures of which three are bad."""
    folder = tmp_path_factory.mktemp("features")
    recipe, run = recipe_of(folder, actors=1), write_run(folder)
    return Made(folder, recipe, run, features.run(recipe, run, PROGRESS))


def block_of(run: Run, recipe: Recipe, first: int = 0, count: int = IMAGES) -> pa.Table:
    """Return the input of `EncodeWindows`, in this process."""
    read = parts.ReadImages(size=recipe.dataset.feature_size, interpolation="bilinear")
    return read(samples.load(run, "train").slice(first, count))


def windows_of(block: pa.Table) -> pa.Table:
    return block.filter(block["group"].is_valid())


@pytest.mark.ray
def test_rows_are_the_kept_windows_and_their_class_tokens(made: Made) -> None:
    encoder = Encoder.from_pretrained("tiny", str(made.folder / "encoder.safetensors"))
    windows = sliding_windows((SIDE // 8, SIDE // 8), made.recipe.windows.scales)
    table, listed = made.table, samples.load(made.run, "train")
    assert table.schema.field("feature").type == pa.list_(pa.float32(), encoder.width)
    assert [str(table.schema.field(n).type) for n in ("index", *PLACE)] == ["int32"] + ["int16"] * 4
    for index in (0, 4, 33, 68):
        pixels = images.resize(images.read_image(listed["image"][index].as_py()), (SIDE, SIDE))
        image = normalise(torch.tensor(pixels)[None])
        saliency = encoder.saliency(image)[0].numpy()
        kept = select_windows(windows, saliency, 8, min_foreground=0.5, min_background=0.55)
        rows = table.filter(pc.equal(table["index"], index))
        expected = ["foreground"] * len(kept[0]) + ["background"] * len(kept[1])
        assert rows["group"].to_pylist() == expected
        places = windows[np.concatenate(kept)]
        assert np.array_equal(np.stack([rows[n].to_numpy() for n in PLACE], 1), places)
        crops = crop_windows(image[0], places, (32, 32))
        found = torch.tensor(np.stack(rows["feature"].to_numpy()))
        torch.testing.assert_close(found, encoder.class_tokens(crops), rtol=1e-5, atol=1e-5)


@pytest.mark.ray
def test_files_are_parts_and_say_what_they_cover(made: Made) -> None:
    assert [f.name for f in made.files] == [parts.part_file(first) for first in (0, 32, 64)]
    summaries = [parts.Summary.from_json(pq.read_schema(f).metadata[b"transfgu"]) for f in made.files]
    assert [s.images for s in summaries] == [32, 32, 6]
    assert [[x.reason for x in s.left_out] for s in summaries] == [[BAD[3]], [BAD[40]], [BAD[69]]]


def known(outcome: Outcome) -> Outcome:
    """Return an outcome without its machine-dependent parts."""
    return replace(outcome, details={n: v for n, v in outcome.details.items() if n != "bottleneck"})


@pytest.mark.ray
def test_the_bottleneck_is_named_by_ray_datas_statistics(made: Made) -> None:
    shares = r"MapBatches\((\w+)\) (?:busy )?(\d+) %"
    found = re.findall(shares, made.outcome.details["bottleneck"])
    assert {name for name, _ in found} == {"ReadImages", "EncodeWindows", "WriteFeatures"}
    assert [int(share) for _, share in found] == sorted((int(share) for _, share in found), reverse=True)
    assert 0 < int(found[0][1]) <= 100


@pytest.mark.ray
def test_outcome_counts_windows_and_names_bad_images(made: Made) -> None:
    groups = made.table["group"].to_pylist()
    counts = {group: groups.count(group) for group in ("foreground", "background")}
    assert known(made.outcome) == Outcome(
        items=IMAGES - len(BAD),
        left_out=tuple(LeftOut(name=f"picture {n:03d}", reason=r) for n, r in BAD.items()),
        details={
            "windows": counts,
            "images without windows": IMAGES - len(BAD) - pc.count_distinct(made.table["index"]).as_py(),
        },
    )
    assert min(counts.values()) > 0


@pytest.mark.ray
def test_two_actors_go_on_where_one_stopped_and_end_in_the_same_bytes(made: Made) -> None:
    before = [f.read_bytes() for f in made.files]
    first, last = made.files[0], made.files[2]
    for file in made.files[1:]:
        file.unlink()
    touched = first.stat().st_mtime_ns
    outcome = features.run(made.recipe.with_fields({"actors": 2}), made.run, PROGRESS)
    assert [f.read_bytes() for f in made.files] == before
    assert first.stat().st_mtime_ns == touched
    assert last.exists()
    assert known(outcome) == known(made.outcome)


@pytest.mark.ray
def test_good_images_features_are_those_without_the_bad_ones_to_the_last_bit(made: Made, tmp_path: Path) -> None:
    good = [n for n in range(IMAGES) if n not in BAD]
    alone = write_run(tmp_path, good, bad=False)
    encode = EncodeWindows(made.recipe, processes=2)
    found = pa.concat_tables(
        windows_of(encode(block_of(alone, made.recipe, first, 32))) for first in range(0, len(good), 32)
    )
    assert len(found) == len(made.table)
    assert found["feature"].combine_chunks().equals(made.table["feature"].combine_chunks())
    assert [good[i] for i in found["index"].to_pylist()] == made.table["index"].to_pylist()


@pytest.mark.ray
def test_plan_reads_in_tasks_encodes_in_actors_and_passes_no_crop(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = parts.split(samples.load(made.run, "train"), 32)
    plan = features.plan(made.recipe, listed, "unused")
    plan.explain()
    physical = capsys.readouterr().out.split("Physical Plan (Optimized)")[1]
    operators = [line.strip(" +-") for line in physical.splitlines() if "[" in line]
    assert operators == [
        "TaskPoolMapOperator[MapBatches(WriteFeatures)]",
        "ActorPoolMapOperator[MapBatches(EncodeWindows)]",
        "TaskPoolMapOperator[MapBatches(ReadImages)]",
        "InputDataBuffer[Input]",
    ]
    block = block_of(made.run, made.recipe, 0, 32)
    encoded = EncodeWindows(made.recipe, processes=2)(block)
    # Pixels pass between the operators as whole images only, and not at all behind the encoder.
    assert block.schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), (3, SIDE, SIDE))
    assert encoded.column_names == ["part", "index", *PLACE, "feature", "group", "name", "reason", "note"]
    assert encoded.nbytes < len(encoded) * (4 * 24 + 100)


@pytest.mark.ray
def test_on_gpus_the_plan_is_the_same(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(capacity.NODES, '[{"count": 2, "CPU": 4, "GPU": 1}]')
    features.plan(made.recipe, parts.split(samples.load(made.run, "train"), 32), "unused").explain()
    assert "ActorPoolMapOperator[MapBatches(EncodeWindows)]" in capsys.readouterr().out


@pytest.mark.ray
def test_a_mistake_that_an_actor_finds_as_it_starts_is_one_line(tmp_path: Path, ray_cluster: None) -> None:
    run = write_run(tmp_path, [0, 1])
    recipe = recipe_of(tmp_path)
    (tmp_path / "encoder.safetensors").unlink()  # after what is checked before Ray starts
    with refused("file-missing encoder.safetensors"):
        features.run(recipe, run, PROGRESS)


def test_an_image_without_windows_is_kept_in_the_count(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, saliency_factor=50.0, stuff=0)
    run = write_run(tmp_path, [0, 1, 3])
    block = EncodeWindows(recipe, processes=1)(block_of(run, recipe))
    assert block["group"].to_pylist() == [None] * 3
    assert block["reason"].to_pylist() == [None, None, BAD[3]]
    told = WriteFeatures(folder=str(tmp_path / "out"), groups=("foreground",))(block)
    summary = parts.Summary.from_json(told["summary"][0].as_py())
    assert summary.counts == {"foreground": 0, "images without windows": 2}
    assert (summary.images, len(summary.left_out)) == (3, 1)
    assert len(pq.read_table(tmp_path / "out" / summary.file)) == 0


def test_a_part_fills_the_batch_its_saliency_is_found_in(tmp_path: Path) -> None:
    run = write_run(tmp_path, range(32), bad=False)
    recipe = recipe_of(tmp_path, **{"feature_size": (32, 32), "windows.scales": (0.5,)})
    actor = EncodeWindows(recipe, processes=1)
    assert actor.frozen.rows((32, 32)) == 64  # windows of 32 x 32 at a time
    seen: list[int] = []
    actor.frozen.encoder.vit.patch_embed.proj.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    actor(block_of(run, recipe))
    assert seen[0] == 32


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("foreground", "background")),
        ({"stuff": 0}, ("foreground",)),
        ({"groups": "foreground", "stuff": 0}, ("foreground",)),
        ({"groups": "all"}, ("all",)),
        ({"groups": "all", "stuff": 0}, ("all",)),
    ],
)
def test_groups_kept(tmp_path: Path, fields: dict[str, object], expected: tuple[str, ...]) -> None:
    recipe = recipe_of(tmp_path, **fields)
    assert features.groups(recipe) == expected
    run = write_run(tmp_path, [0, 1])
    block = EncodeWindows(recipe, processes=1)(block_of(run, recipe))
    assert set(block["group"].to_pylist()) - {None} == set(expected)
    if expected == ("all",):
        assert len(block) == 2 * len(sliding_windows((8, 8), recipe.windows.scales))
