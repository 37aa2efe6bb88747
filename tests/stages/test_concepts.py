"""The stage on small parts, against K-Means of the same rows in one process."""

import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from numpy import ndarray

from tests.refusals import refused
from transfgu.inference.shards import NEAREST, KMeansActor, nearest_windows, own_shard
from transfgu.kmeans import Grid, Shard, Shards, cluster, whitened
from transfgu.recipe import Recipe, preset
from transfgu.runtime import capacity as runtime
from transfgu.runtime import spread
from transfgu.runtime.progress import Progress
from transfgu.stages import concepts
from transfgu.stages.concepts import kmeans
from transfgu.store import scratch, storage
from transfgu.store.artifacts import Run

D = 6
IMAGES_A_PART = 10


def recipe_of(**fields: object) -> Recipe:
    return preset("shapes").with_fields({"things": 3, "stuff": 2, "iterations": 50, **fields})


def made_windows(images: int, seed: int = 0) -> pa.Table:
    """Six windows per image: four of three things, two of two kinds of stuff, far apart."""
    generator = np.random.default_rng(seed)
    n = 6 * images
    group = np.tile(["foreground", "background", "foreground"], n // 3)
    kind = np.where(group == "foreground", generator.integers(0, 3, n), generator.integers(3, 5, n))
    means = 20 * np.eye(5, D)
    feature = (means[kind] + generator.standard_normal((n, D))).astype(np.float32)
    y0, x0 = generator.integers(0, 50, (2, n))
    return table_of(np.repeat(np.arange(images), 6), group, feature, np.stack([y0, y0 + 40, x0, x0 + 30], 1))


def table_of(index: ndarray, group: ndarray, feature: ndarray, place: ndarray) -> pa.Table:
    columns = {"index": pa.array(index, pa.int32())}
    columns |= {name: pa.array(c, pa.int16()) for name, c in zip(("y0", "y1", "x0", "x1"), place.T, strict=True)}
    columns["group"] = pa.array(group).dictionary_encode()
    columns["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(feature.ravel()), feature.shape[1])
    return pa.table(columns)


def write_parts(folder: Path, windows: pa.Table) -> Run:
    run = Run(str(folder))
    index = windows["index"].to_numpy()
    for first in range(0, int(index.max()) + 1, IMAGES_A_PART):
        part = windows.filter((index >= first) & (index < first + IMAGES_A_PART))
        buffer = pa.BufferOutputStream()
        pq.write_table(part, buffer)
        storage.write_bytes(run.artifact("features").file(f"part-{first:08d}.parquet"), buffer.getvalue().to_pybytes())
    storage.write_bytes(run.artifact("features").file("manifest.json"), json.dumps({}).encode())
    return run


def features_of(windows: pa.Table, group: str | None = None) -> ndarray:
    features = windows["feature"].combine_chunks().flatten().to_numpy().reshape(-1, D)
    chosen: ndarray = features if group is None else features[np.array(windows["group"].to_pylist()) == group]
    return chosen


def read_tensors(run: Run) -> dict[str, ndarray]:
    tensors: dict[str, ndarray] = safetensors.numpy.load(
        storage.read_bytes(run.artifact("concepts").file("concepts.safetensors"))
    )
    return tensors


def by_first(centroids: ndarray) -> ndarray:
    return centroids[np.lexsort(centroids.T)]


def quiet() -> Progress:
    return Progress("concepts", quiet=True)


# ---- nearest windows ----


def nearest_of(concept: list[int], image: list[int], distance: list[float]) -> list[tuple[int, int, float]]:
    table = pa.table(
        {
            "concept": pa.array(concept, pa.int32()),
            "index": pa.array(image, pa.int32()),
            "distance": pa.array(distance, pa.float32()),
        }
    )
    chosen = nearest_windows(table, 3)
    return list(zip(*(chosen[name].to_pylist() for name in ("concept", "index", "distance")), strict=True))


def test_nearest_windows_are_of_different_images_first() -> None:
    # Concept 0: image 5 has the two nearest, but only one of them is shown, as there are three images.
    chosen = nearest_of([0, 0, 1, 0, 0, 0], [5, 5, 5, 6, 7, 8], [0.1, 0.2, 9.0, 0.4, 0.3, 0.5])
    assert [(c, i) for c, i, _ in chosen] == [(0, 5), (0, 7), (0, 6), (1, 5)]
    # Where two images are all there is, the nearest of the rest follows, in order of distance.
    chosen = nearest_of([0, 0, 0, 0], [5, 5, 5, 6], [0.125, 0.25, 0.5, 1.0])
    assert chosen == [(0, 5, 0.125), (0, 5, 0.25), (0, 6, 1.0)]


def test_nearest_of_shards_are_the_nearest_of_all() -> None:
    generator = np.random.default_rng(0)
    image = np.sort(generator.integers(0, 40, 400))
    table = pa.table(
        {"concept": generator.integers(0, 4, 400), "index": image, "distance": generator.random(400, dtype=np.float32)}
    )
    for cuts in ([100, 250], [3, 6, 9]):  # the second with shards of one image or two
        bounds = [0, *np.searchsorted(image, image[cuts]), 400]
        shards = [nearest_windows(table[a:b]) for a, b in itertools.pairwise(bounds) if a < b]
        assert nearest_windows(pa.concat_tables(shards)).equals(nearest_windows(table))


# ---- the actor's own work, in this process ----


def test_parts_are_shared_out_in_pieces_that_do_not_depend_on_workers() -> None:
    parts = [f"part-{n}" for n in range(100)]
    for workers in (1, 2, 3, 4, 9):
        shares = concepts.in_pieces(parts, workers)
        assert len(shares) == min(workers, 4)
        pieces = [piece for share in shares for piece in share]
        assert [len(piece) for piece in pieces] == [32, 32, 32, 4]
        assert [part for piece in pieces for part in piece] == parts
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_actor_reads_its_parts_by_group(tmp_path: Path) -> None:
    windows = made_windows(25)
    run = write_parts(tmp_path, windows)
    groups = concepts.groups_of(recipe_of())
    parts, size = concepts.feature_parts(run.artifact("features"))
    assert [Path(p).name for p in parts] == [f"part-{n:08d}.parquet" for n in (0, 10, 20)]
    assert size > windows.nbytes / 2
    actor = KMeansActor(functools.partial(concepts.read_parts, [parts[:2], parts[2:]], groups), threads=1)
    foreground, background = features_of(windows, "foreground"), features_of(windows, "background")
    assert actor.measure("things") == (100, float(np.abs(foreground).max()))
    assert actor.measure("stuff") == (50, float(np.abs(background).max()))
    rows = np.array([0, 37, 40, 99])  # two of the first part, one of the second, the last of all
    taken = actor.take("things", rows)
    assert taken is not None
    np.testing.assert_array_equal(taken, foreground[rows])
    assert actor.take("stuff", rows[:0]) is None


def test_an_actor_keeps_many_rows_on_disk(tmp_path: Path) -> None:
    run, groups = write_parts(tmp_path, made_windows(25)), concepts.groups_of(recipe_of())
    parts, size = concepts.feature_parts(run.artifact("features"))
    pieces, disk = [parts[:2], parts[2:]], str(tmp_path / "disk")
    in_memory = concepts.read_parts(pieces, groups, size, disk, resident=size)
    on_disk = concepts.read_parts(pieces, groups, size, disk, resident=size - 1)
    assert in_memory["things"].scratch is None
    assert on_disk["things"].scratch is on_disk["stuff"].scratch is not None
    one, other = (KMeansActor(source, threads=1) for source in (lambda: in_memory, lambda: on_disk))
    centroids, grid = np.eye(3, D, dtype=np.float32), Grid(100, one.measure("things")[1])
    first, second = (actor.assign("things", centroids, grid).sums for actor in (one, other))
    np.testing.assert_array_equal(first, second)
    # Without room on the disk they stay in memory.
    assert concepts.read_parts(pieces, groups, 1 << 60, disk, resident=0)["things"].scratch is None


def test_a_disk_that_becomes_full_is_told(tmp_path: Path) -> None:
    room = scratch.Scratch(str(tmp_path))
    room.spare = 1 << 60
    with refused("disk-full"):
        concepts.kept_rows(np.ones((2, 2), np.float32), room)


def test_features_that_nodes_cannot_hold_go_to_those_that_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    head = {"CPU": 4.0, "memory": 10e9}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": head}])
    monkeypatch.setenv(runtime.NODES, '[{"count": 8, "CPU": 5}, {"count": 4, "CPU": 16}]')
    fits, large = 7 * 10**9, 11 * 10**9
    nodes = spread.actor_nodes(fits)  # 9.1 GB in memory
    assert nodes == [head]
    assert spread.actor_count(fits, nodes) == 1
    assert spread.actor_memory(float(fits)) == 9_100_000_000
    nodes = spread.actor_nodes(large)  # 14.3 GB
    assert [node["CPU"] for node in nodes] == [5] * 8 + [16] * 4 + [4]
    assert spread.actor_count(large, nodes) == 13
    assert spread.actor_memory(large / 13) == 1_100_000_000
    assert spread.actor_memory(100e6) == 0
    # Only the largest can hold a shard of three, and two of 10.8 GB at most.
    wide = [{"CPU": 4.0, "memory": memory} for memory in (4e9, 4e9, 30e9)]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in wide])
    assert len(spread.actor_nodes(25 * 10**9)) == 15
    assert spread.actor_nodes(20 * 10**9) == wide  # 8.7 GB each
    # Where none may come, it is tried with what is there.
    monkeypatch.setenv(runtime.NODES, "")
    assert spread.actor_nodes(50 * 10**9) == wide
    assert spread.actor_memory(50e9) == 0


AWS = [{"CPU": 4.0}, *[{"CPU": 4.0, "GPU": 1.0}] * 8, *[{"CPU": 16.0}] * 4]  # with a head of 4 CPUs
LARGE = [{"CPU": 8.0}, *[{"CPU": 192.0, "GPU": 8.0}] * 8]
WINDOWS = 10_646_000 * 1536  # bytes of the features of COCO-Stuff-27's training images


@pytest.mark.parametrize(
    ("nodes", "size", "actors", "gpus"),
    [
        (AWS, WINDOWS, 8, 1.0),
        (AWS, 10**6, 1, 1.0),  # however small, on a GPU
        (LARGE, WINDOWS, 61, 1.0),  # one per 256 MiB
        (LARGE, 10 * WINDOWS, 64, 1.0),
        ([{"CPU": 4.0}, *[{"CPU": 16.0}] * 4], WINDOWS, 5, 0.0),  # no GPU: by cores
    ],
)
def test_kmeans_goes_to_the_gpus_of_a_cluster_that_has_some(
    nodes: list[dict[str, float]], size: int, actors: int, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {**n, "memory": 1e12}} for n in nodes])
    monkeypatch.delenv(runtime.NODES, raising=False)
    chosen = spread.actor_nodes(size)
    assert spread.actor_count(size, chosen) == actors
    assert all(node.get("GPU") for node in chosen) == bool(gpus)
    assert spread.actor_resources(actors, chosen)["num_gpus"] == gpus


def test_more_actors_than_gpus_share_them() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    assert spread.actor_resources(5, nodes) == {"num_cpus": 1.0, "num_gpus": 0.4}


def test_a_process_without_a_gpu_computes_on_its_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = np.ones((5, 2), np.float32)
    assert type(own_shard([rows])) is Shard or torch.cuda.is_available()
    # Where NVIDIA's files are but torch finds no GPU, too, and where the environment says so.
    monkeypatch.setenv("TRANSFGU_DEVICE", "cpu")
    assert type(own_shard([rows], gpu_files=[str(tmp_path)])) is Shard


def test_groups_follow_the_recipe() -> None:
    def names(recipe: Recipe) -> list[tuple[str, str, int]]:
        return [(g.name, g.windows, g.count) for g in concepts.groups_of(recipe)]

    assert names(preset("coco-stuff-27")) == [("things", "foreground", 12), ("stuff", "background", 15)]
    assert names(preset("coco-80")) == [("things", "foreground", 80)]
    assert names(preset("cityscapes")) == [("concepts", "all", 27)]
    assert names(preset("lip-5")) == [("concepts", "all", 5)]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    run = write_parts(tmp_path, made_windows(10))
    uri = run.artifact("features").file("part-00000000.parquet")
    storage.write_bytes(uri, storage.read_bytes(uri)[:-20])
    with refused("file-damaged part-00000000.parquet"):
        concepts.read_part(uri, concepts.groups_of(recipe_of()))


def test_no_features_at_all(tmp_path: Path) -> None:
    with refused("features-missing"):
        concepts.feature_parts(Run(str(tmp_path)).artifact("features"))


@pytest.mark.parametrize(
    ("fields", "rows", "refusal"),
    [
        (
            {"encoder.name": "vit_tiny_patch16_224", "encoder.weights": "random"},
            0,
            "windows-missing foreground vit_tiny_patch16_224 random windows.min_foreground 0.5 encoder.weights",
        ),
        ({}, 2, "concepts-too-many 3 2 foreground concepts.things"),
        (
            {"windows.groups": "all"},
            4,
            "concepts-too-many 5 4 concepts.things concepts.stuff",
        ),
        ({"things": 0}, 0, "windows-missing background windows.min_background 0.8"),
        ({"things": 0}, 1, "concepts-too-many 2 1 background concepts.stuff"),
        ({}, -10, "features-not-finite foreground encoder.precision float32"),
    ],
)
def test_what_can_not_be_clustered(fields: dict[str, object], rows: int, refusal: str) -> None:
    recipe = recipe_of(**fields)
    features = np.full((abs(rows), D), np.nan if rows < 0 else 1.0, np.float32)
    with refused(refusal):
        concepts.check_group(recipe, concepts.groups_of(recipe)[0], Shard([features]))


@pytest.mark.parametrize("white", [False, True])
def test_an_interrupted_group_goes_on(tmp_path: Path, white: bool) -> None:
    recipe, folder = recipe_of(things=11), Run(str(tmp_path)).artifact("concepts")
    rows = np.random.default_rng(0).standard_normal((12_000, D), dtype=np.float32)
    group = concepts.groups_of(recipe)[0]

    def shard() -> Shards:
        return whitened(Shard([rows])) if white else Shard([rows])

    whole = cluster(shard(), 11, iterations=50, seed=recipe.seed)

    class Stopped(Exception):
        pass

    class StopsAfterFive(Progress):
        def update(self, done: int, total: int | None, unit: str, more: str = "") -> None:
            assert (total, unit) == (None, f"K-Means iterations over {group.name} (at most 50)")
            if done == 5:
                raise Stopped

    with pytest.raises(Stopped):
        concepts.cluster_group(recipe, group, shard(), folder, StopsAfterFive("concepts", quiet=True), save_seconds=0)
    saved = concepts.saved_state(folder, group)
    assert saved is not None
    assert saved[0] == 4  # the fifth was under way to the disk
    resumed = concepts.cluster_group(recipe, group, shard(), folder, quiet(), save_seconds=0)
    np.testing.assert_array_equal(resumed.centroids, whole.centroids)
    assert (resumed.iterations, resumed.inertia) == (whole.iterations, whole.inertia)


# ---- the stage, on Ray ----


@pytest.mark.ray
def test_things_come_from_foreground_and_stuff_from_background(tmp_path: Path, ray_cluster: None) -> None:
    windows = made_windows(25)
    run, recipe = write_parts(tmp_path, windows), recipe_of(whiten="none")
    outcome = concepts.run(recipe, run, quiet())
    assert outcome.items == 150
    assert outcome.details["windows"] == {"foreground": 100, "background": 50}
    assert outcome.details["actors"] == 1  # so few windows are not worth a second
    tensors = read_tensors(run)
    assert tensors["centroids"].shape == (5, D)
    assert tensors["centroids"].dtype == np.float32
    assert tensors["counts"].sum() == 150
    assert tensors["counts"][:3].sum() == 100
    for group, k, own in (("foreground", 3, slice(0, 3)), ("background", 2, slice(3, 5))):
        expected = kmeans(features_of(windows, group), k, seed=recipe.seed)
        np.testing.assert_allclose(by_first(tensors["centroids"][own]), by_first(expected.centroids), atol=1e-5)

    nearest = pq.read_table(run.artifact("concepts").file("nearest.parquet"))
    assert nearest.schema.names == ["concept", "index", "y0", "y1", "x0", "x1", "distance"]
    assert [str(t) for t in nearest.schema.types] == ["int32", "int32", *["int16"] * 4, "float"]
    assert nearest["concept"].to_pylist() == sorted([*range(5)] * NEAREST)
    features, places = features_of(windows), windows.select(["index", "y0", "y1", "x0", "x1"]).to_pylist()
    for concept in range(5):
        rows = nearest.filter(nearest["concept"].to_numpy() == concept)
        assert len(set(rows["index"].to_pylist())) == NEAREST
        distances = np.linalg.norm(features - tensors["centroids"][concept], axis=1)
        by_distance = dict(zip((tuple(p.values()) for p in places), distances.tolist(), strict=True))
        shown = [by_distance[tuple(p.values())] for p in rows.drop_columns(["concept", "distance"]).to_pylist()]
        np.testing.assert_allclose(rows["distance"].to_numpy(), shown, rtol=1e-5)
        assert shown == sorted(shown)
        assert shown[0] == distances.min()
    # Only what others read is left.
    assert {Path(f).name for f in storage.list_files(run.artifact("concepts").uri)} == {
        "concepts.safetensors",
        "nearest.parquet",
    }


@pytest.mark.ray
def test_two_actors_and_a_lost_one_make_no_difference(tmp_path: Path, ray_cluster: None) -> None:
    import ray

    windows = made_windows(25, seed=3)
    run, recipe = write_parts(tmp_path, windows), recipe_of(**{"windows.groups": "all"})
    group = concepts.groups_of(recipe)[0]
    parts, _ = concepts.feature_parts(run.artifact("features"))
    shares = concepts.in_pieces(parts, 2, 1)
    assert [[len(piece) for piece in share] for share in shares] == [[1], [1, 1]]
    sources = [functools.partial(concepts.read_parts, share, [group]) for share in shares]
    with spread.start_actors(sources, spread.actor_nodes(), restarts=1) as actors:
        rows = spread.SpreadShards(actors, "concepts")
        assert rows.rows == 150
        result = cluster(rows, 5, seed=recipe.seed)
        nearest = rows.nearest(result.centroids, 0)
        ray.kill(actors[0], no_restart=False)
        assert rows.nearest(result.centroids, 0).equals(nearest)  # from an actor that has read its parts again
        assert cluster(rows, 5, seed=recipe.seed).inertia == result.inertia
    concepts.run(recipe, run, quiet(), piece_parts=1)
    np.testing.assert_array_equal(read_tensors(run)["centroids"], result.centroids)
    assert pq.read_table(run.artifact("concepts").file("nearest.parquet")).equals(nearest)


@pytest.mark.ray
def test_whitened_groups_on_two_actors_and_after_a_loss(tmp_path: Path, ray_cluster: None) -> None:
    """Only foreground windows are whitened; concepts are means of their original features."""
    import ray

    windows = made_windows(25, seed=5)
    run, recipe = write_parts(tmp_path, windows), recipe_of(whiten="foreground")
    groups = concepts.groups_of(recipe)
    parts, _ = concepts.feature_parts(run.artifact("features"))
    sources = [functools.partial(concepts.read_parts, share, groups) for share in concepts.in_pieces(parts, 2, 1)]
    with spread.start_actors(sources, spread.actor_nodes(), restarts=1) as actors:
        white = whitened(spread.SpreadShards(actors, "things"))
        assert isinstance(white, spread.SpreadShards)
        result = cluster(white, 3, seed=recipe.seed)
        found, nearest = white.means_before(result.centroids), white.nearest(result.centroids, 0)
        ray.kill(actors[0], no_restart=False)
        np.testing.assert_array_equal(white.means_before(result.centroids), found)
        assert white.nearest(result.centroids, 0).equals(nearest)
    concepts.run(recipe, run, quiet(), piece_parts=1)
    tensors = read_tensors(run)
    np.testing.assert_array_equal(tensors["centroids"][:3], found)
    stuff = kmeans(features_of(windows, "background"), 2, seed=recipe.seed)
    np.testing.assert_allclose(by_first(tensors["centroids"][3:]), by_first(stuff.centroids), atol=1e-5)
    table = pq.read_table(run.artifact("concepts").file("nearest.parquet"))
    assert table.filter(table["concept"].to_numpy() < 3).equals(nearest)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_that_is_lost_again_and_again_ends_the_stage() -> None:
    sources = [functools.partial(os._exit, 1)]  # as one that fills its node's memory with what it reads
    with refused("actor-lost 1 3"), spread.start_actors(sources, spread.actor_nodes(), restarts=2) as actors:
        spread.SpreadShards(actors, "concepts")


@pytest.mark.ray
def test_an_actor_s_user_error_arrives_in_one_line(tmp_path: Path, ray_cluster: None) -> None:
    run = write_parts(tmp_path, made_windows(10))
    storage.write_bytes(run.artifact("features").file("part-00000010.parquet"), b"no Parquet")
    with refused("file-damaged part-00000010.parquet"):
        concepts.run(recipe_of(), run, quiet())
