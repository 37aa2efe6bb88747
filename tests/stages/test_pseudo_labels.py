"""The pseudo-label stage on a real local Ray: against the encoder's own maps, and against itself in other runs."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch

from tests.stages.small_run import BAD, IMAGES, SIDE, recipe_of, write_run
from transfgu.datasets import images
from transfgu.datasets.packed_maps import unpack_maps
from transfgu.encoder import Encoder, normalise
from transfgu.errors import LeftOut
from transfgu.recipe import Recipe
from transfgu.runtime import connect, parts
from transfgu.runtime.progress import Progress
from transfgu.stages import pseudo_labels, samples
from transfgu.stages.pseudo_labels import MapConcepts, WritePseudoLabels
from transfgu.store.artifacts import Outcome, Run

PROGRESS = Progress("pseudo labels", quiet=True)
GRID = (SIDE // 8, SIDE // 8)


class Made(NamedTuple):
    folder: Path
    recipe: Recipe
    run: Run
    outcome: Outcome

    @property
    def files(self) -> list[Path]:
        return sorted(Path(self.run.artifact("pseudo_labels").uri).glob("*.parquet"))


@pytest.fixture(scope="module")
def made(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The whole stage with one actor, on 70 pictures of which three are bad."""
    folder = tmp_path_factory.mktemp("pseudo_labels")
    recipe, run = recipe_of(folder, actors=1, gradient_scale=0.5), write_run(folder)
    write_concepts(run)
    return Made(folder, recipe, run, pseudo_labels.run(recipe, run, PROGRESS))


def write_concepts(run: Run) -> None:
    folder = Path(run.artifact("concepts").uri)
    folder.mkdir()
    centroids = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    safetensors.numpy.save_file({"centroids": centroids}, folder / "concepts.safetensors")


def planes(rows: pa.Table) -> torch.Tensor:
    return torch.tensor(np.stack([np.frombuffer(m, np.int16).reshape(-1, *GRID) for m in rows["maps"].to_pylist()]))


@pytest.mark.ray
def test_a_part_that_alone_is_missing_is_made_here_to_the_same_bits(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {path.name: path.read_bytes() for path in made.files}
    (made.files[1]).unlink()
    monkeypatch.setattr(connect, "works_here", lambda: True)
    monkeypatch.setattr(pseudo_labels, "plan", lambda *_: pytest.fail("Ray was asked"))
    outcome = pseudo_labels.run(made.recipe, made.run, PROGRESS)
    assert {path.name: path.read_bytes() for path in made.files} == wanted
    assert (outcome.items, outcome.left_out) == (made.outcome.items, made.outcome.left_out)


@pytest.mark.ray
def test_rows_are_the_packed_maps_of_every_good_image(made: Made) -> None:
    encoder = Encoder.from_pretrained("tiny", str(made.folder / "encoder.safetensors"))
    concepts = torch.tensor(pseudo_labels.load_centroids(made.run))
    listed = samples.load(made.run, "train")
    table = pa.concat_tables(pq.read_table(f) for f in made.files)
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("index", "int32"), ("maps", "binary"), ("h", "int16"), ("w", "int16"),
    ]  # fmt: skip
    good = [i for i in range(IMAGES) if i not in BAD]
    assert table["index"].to_pylist() == good
    for row in (0, 3, 40, 66):
        pixels = images.resize(images.read_image(listed["image"][good[row]].as_py()), (SIDE, SIDE))
        expected = encoder.concept_maps(normalise(torch.tensor(pixels)[None]), concepts, gradient_scale=0.5)
        found = planes(table.slice(row, 1))
        assert (table["h"][row].as_py(), table["w"][row].as_py()) == GRID
        torch.testing.assert_close(unpack_maps(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.ray
def test_an_image_s_maps_are_one_row_group(made: Made) -> None:
    for file, count in zip(made.files, (31, 31, 5), strict=True):
        assert pq.ParquetFile(file).metadata.num_row_groups == count


@pytest.mark.ray
def test_outcome_names_bad_images(made: Made) -> None:
    bad = tuple(LeftOut(name=f"picture {n:03d}", reason=r) for n, r in BAD.items())
    details = {"concepts": 5, "bottleneck": made.outcome.details["bottleneck"]}
    assert made.outcome == Outcome(items=IMAGES - len(BAD), left_out=bad, details=details)
    assert "MapBatches(MapConcepts) " in details["bottleneck"]


@pytest.mark.ray
def test_two_actors_go_on_where_one_stopped_and_end_in_the_same_bytes(made: Made) -> None:
    before = [f.read_bytes() for f in made.files]
    kept = made.files[1]
    for file in (made.files[0], made.files[2]):
        file.unlink()
    touched = kept.stat().st_mtime_ns
    outcome = pseudo_labels.run(made.recipe.with_fields({"actors": 2}), made.run, PROGRESS)
    assert [f.read_bytes() for f in made.files] == before
    assert kept.stat().st_mtime_ns == touched
    assert (outcome.items, outcome.left_out) == (made.outcome.items, made.outcome.left_out)


@pytest.mark.ray
def test_plan_reads_in_tasks_and_maps_in_actors(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    listed = parts.split(samples.load(made.run, "train"), 32)
    pseudo_labels.plan(made.recipe, listed, pseudo_labels.load_centroids(made.run), "unused").explain()
    physical = capsys.readouterr().out.split("Physical Plan (Optimized)")[1]
    assert [line.strip(" +-") for line in physical.splitlines() if "[" in line] == [
        "TaskPoolMapOperator[MapBatches(WritePseudoLabels)]",
        "ActorPoolMapOperator[MapBatches(MapConcepts)]",
        "TaskPoolMapOperator[MapBatches(ReadImages)]",
        "InputDataBuffer[Input]",
    ]


@pytest.mark.ray
def test_maps_of_any_samples_can_be_had_without_a_file(made: Made, tmp_path: Path) -> None:
    other = write_run(tmp_path, [3, 7, 8], split="validation")
    listed = samples.load(other, "validation")
    data = pseudo_labels.maps_dataset(made.recipe, listed, pseudo_labels.load_centroids(made.run))
    rows = {row["name"]: row for row in data.iter_rows()}
    assert {name: row["reason"] for name, row in rows.items()} == {
        "picture 003": BAD[3],
        "picture 007": None,
        "picture 008": None,
    }
    stored = pq.read_table(made.files[0])
    place = stored["index"].to_pylist().index(7)
    assert rows["picture 007"]["maps"] == stored["maps"][place].as_py()


def test_a_part_fills_the_batches_it_is_mapped_in(tmp_path: Path) -> None:
    run = write_run(tmp_path, range(32), bad=False)
    recipe = recipe_of(tmp_path, image_size=(32, 32))
    read = parts.ReadImages(size=(32, 32), interpolation="bilinear")
    actor = pseudo_labels.MapConcepts(recipe, np.ones((2, 24), np.float32), processes=1)
    assert actor.frozen.rows((32, 32)) == 64  # windows of 32 x 32 at a time
    seen: list[int] = []
    actor.frozen.encoder.vit.patch_embed.proj.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    assert len(actor(read(samples.load(run, "train")))) == 32
    assert seen == [32]


def test_curated_images_alone_get_maps(tmp_path: Path) -> None:
    run = write_run(tmp_path, [0, 1, 2, 5])
    write_concepts(run)
    recipe = recipe_of(tmp_path, curated=True)
    folder = run.artifact("pseudo_labels").uri
    # The part that covers exactly the even pictures is there, so nothing is left to make.
    maps = pa.table({"index": [0, 2], "maps": [b"\0\0", b"\0\0"], "h": [1, 1], "w": [1, 1]})
    parts.write_maps(folder, parts.Summary(part=0, images=2), maps, "")
    assert pseudo_labels.run(recipe, run, PROGRESS).items == 2


def test_a_part_of_bad_images_alone_is_an_empty_file(tmp_path: Path) -> None:
    recipe, run = recipe_of(tmp_path), write_run(tmp_path, [3, 69])
    read = parts.ReadImages(size=(SIDE, SIDE), interpolation="bilinear")
    block = MapConcepts(recipe, np.ones((5, 24), np.float32), processes=1)(read(samples.load(run, "train")))
    told = WritePseudoLabels(folder=str(tmp_path / "out"))(block)
    summary = parts.Summary.from_json(told["summary"][0].as_py())
    assert [x.reason for x in summary.left_out] == [BAD[3], BAD[69]]
    table = pq.read_table(tmp_path / "out" / summary.file)
    assert (len(table), table.column_names) == (0, ["index", "maps", "h", "w"])
