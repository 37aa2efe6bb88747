"""The whole method in one call: mistakes are reported before Ray starts, and complete stages are not repeated."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
from PIL import Image

from tests import hub
from tests.folder_run import IMAGES, SIDE, pack, pack_lance, photographs, small
from tests.refusals import refused
from transfgu import pipeline
from transfgu.methods import STAGES
from transfgu.pipeline import fit_to_patch, fit_to_small_encoder
from transfgu.planning import dry_run
from transfgu.pretraining.objective import new_encoder
from transfgu.pretraining.recipe import PretrainingRecipe
from transfgu.recipe import preset
from transfgu.report import page
from transfgu.segmenter import Segmenter
from transfgu.stages import samples
from transfgu.store import lock, storage
from transfgu.store.artifacts import Run
from transfgu.verification import verify


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"data": "file-missing /nowhere/at/all"}, "file-missing /nowhere/at/all"),
        ({"data": "EMPTY"}, "folder-empty"),
        ({"data": ""}, "data-missing folder --data"),
        ({"dataset.layout": "coco", "labels": ""}, "data-layout"),
        ({"encoder.weights": "/nowhere/vit.pth"}, "file-missing /nowhere/vit.pth"),
        (
            {"encoder.name": "vit_unheard_of", "encoder.weights": "random"},
            "encoder-unknown vit_unheard_of",
        ),
        ({"image_size": (60, 64)}, "image-size dataset.image_size 60x64 8 64x64"),
        ({"windows.size": (32, 30)}, "image-size windows.size 32x30"),
    ],
)
def test_mistakes_are_told_before_ray_starts(tmp_path: Path, fields: dict[str, object], refusal: str) -> None:
    photographs(tmp_path)
    (tmp_path / "empty").mkdir()
    fields = {name: str(tmp_path / "empty") if value == "EMPTY" else value for name, value in fields.items()}
    with refused(refusal):
        pipeline.run_stages(small(tmp_path, **fields), Run(str(tmp_path / "run")), quiet=True)


@pytest.mark.usefixtures("no_ray")
def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    photographs(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with refused("storage-failed file/run"):
        pipeline.run_stages(small(tmp_path), Run(str(tmp_path / "file" / "run")), quiet=True)


@pytest.mark.usefixtures("no_ray")
def test_another_recipes_run_folder(tmp_path: Path) -> None:
    photographs(tmp_path)
    run = Run(str(tmp_path / "run"))
    run.artifact("features").begin(small(tmp_path))
    with refused("recipe-mismatch windows.scales"):
        pipeline.run_stages(small(tmp_path, **{"windows.scales": (0.5,)}), run, quiet=True)


@pytest.mark.usefixtures("no_ray")
def test_a_folder_that_another_run_writes(tmp_path: Path) -> None:
    photographs(tmp_path)
    run = Run(str(tmp_path / "run"))
    with (
        lock.hold(run.uri, print),
        refused("run-locked --run"),
    ):
        pipeline.run_stages(small(tmp_path), run, quiet=True)
    assert not Path(run.file("recipe.yaml")).exists()  # nothing was touched


@pytest.mark.usefixtures("no_ray")
def test_an_unknown_stage(tmp_path: Path) -> None:
    with refused("stage-unknown train samples features"):
        pipeline.run_stages(preset("shapes"), Run(str(tmp_path)), until="train")


@pytest.mark.usefixtures("no_ray")
def test_nothing_to_evaluate(tmp_path: Path) -> None:
    with refused("flag-missing"):
        pipeline.evaluate(preset("shapes"), None)


def test_a_presets_sides_follow_the_patch() -> None:
    recipe = fit_to_patch(preset("coco-stuff-27"), 14)
    assert recipe.dataset.image_size == (322, 322)
    assert recipe.dataset.feature_size == (644, 644)
    assert recipe.windows.size == (322, 322)
    assert fit_to_patch(recipe, 14) == recipe
    assert recipe.dataset.training_size == (308, 308)  # halves are multiples of 14, too
    assert fit_to_patch(preset("lip-5"), 16).dataset.training_size == (480, 256)
    assert fit_to_patch(preset("coco-stuff-27"), 16) == preset("coco-stuff-27")


def encoder_file(path: Path, side: int, **metadata: str) -> str:
    """Write an untrained encoder of patch 4 for images of `side` pixels, like `transfgu pretrain`."""
    recipe = PretrainingRecipe(patch_size=4, width=12, depth=2, heads=3, global_size=side, local_size=8)
    safetensors.torch.save_file(new_encoder(recipe).state_dict(), path, metadata)
    return str(path)


def test_a_method_of_comparison_keeps_its_own_training_with_a_small_encoder() -> None:
    for name in ("token-kmeans", "maskcontrast", "linear-head"):
        recipe = preset("folder", name).with_fields({"encoder.name": "vit_shapes"})
        fitted = fit_to_small_encoder(recipe)
        own = {"epochs", "passes", *({"lr"} if name != "token-kmeans" else set())}
        assert {f: getattr(fitted.training, f) for f in own} == {f: getattr(recipe.training, f) for f in own}
        assert fitted.dataset.image_size == (128, 128)


def test_a_file_of_a_small_encoder_is_enough(tmp_path: Path) -> None:
    """An encoder of 24 pixels: images of 8/3 x 24 = 64, windows of 24, and the demonstration's training."""
    weights = encoder_file(tmp_path / "mine.safetensors", 24, patch_size="4", num_heads="3")
    recipe = fit_to_small_encoder(preset("folder").with_fields({"encoder.weights": weights, "epochs": 3}))
    assert (recipe.encoder.name, recipe.encoder.weights) == ("mine", weights)
    assert recipe.dataset.image_size == recipe.dataset.feature_size == recipe.dataset.training_size == (64, 64)
    assert recipe.windows.size == (24, 24)
    assert recipe.training.epochs == 3  # as given
    assert (recipe.training.lr, recipe.training.passes, recipe.concepts.whiten) == (1e-2, 4, "foreground")
    assert fit_to_small_encoder(recipe) == recipe
    shapes = fit_to_small_encoder(preset("folder").with_fields({"encoder.name": "vit_shapes"}))
    assert shapes.dataset == dataclasses.replace(preset("shapes").dataset, **{
        name: getattr(preset("folder").dataset, name) for name in ("layout", "classes", "orient")
    })  # fmt: skip
    assert shapes.training == preset("shapes").training


def test_other_encoders_and_presets_keep_their_fields(tmp_path: Path) -> None:
    large = encoder_file(tmp_path / "large.safetensors", 128, patch_size="4", num_heads="3")
    recipe = preset("folder").with_fields({"encoder.weights": large})
    assert fit_to_small_encoder(recipe) == recipe.with_fields({"encoder.name": "large"})
    unnamed = encoder_file(tmp_path / "plain.safetensors", 24)
    small = encoder_file(tmp_path / "small.safetensors", 24, patch_size="4", num_heads="3")
    for kept in (
        preset("folder"),
        preset("folder").with_fields({"encoder.weights": unnamed}),
        preset("coco-stuff-27").with_fields({"encoder.weights": small}),
        preset("folder", "iic").with_fields({"encoder.weights": small}),
    ):
        assert fit_to_small_encoder(kept) == kept


def test_a_run_that_is_there_keeps_the_fields_it_has(tmp_path: Path) -> None:
    photographs(tmp_path)
    weights = encoder_file(tmp_path / "mine.safetensors", 24, patch_size="4", num_heads="3")
    run = Run(str(tmp_path / "run"))
    asked = preset("folder").with_fields({"data": str(tmp_path / "images"), "encoder.weights": weights})
    old = asked.with_fields({"encoder.name": "mine"})
    storage.write_bytes(run.file("recipe.yaml"), old.to_yaml().encode())
    assert pipeline.preflight(old, run).dataset.image_size == (320, 320)
    other = Run(str(tmp_path / "other"))
    assert pipeline.preflight(asked, other).dataset.image_size == (64, 64)


@pytest.mark.ray
@pytest.mark.usefixtures("small_work_here")
def test_the_whole_method_and_again_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs(tmp_path)
    recipe, run = small(tmp_path), Run(str(tmp_path / "run"))
    pipeline.run_stages(recipe, run, until="concepts")
    assert not Path(run.file("pseudo_labels")).exists()
    metrics = pipeline.run_stages(recipe, run, report=page.write)
    assert set(metrics["stages"]) == set(STAGES)
    assert [s for s in STAGES if metrics["stages"][s]["skipped"]] == ["samples", "features", "concepts"]
    assert 0 <= metrics["mean_iou"] <= 100
    assert 50 <= metrics["pixel_accuracy"] <= 100  # two classes, matched
    assert set(metrics["iou"]) == {"class 0", "class 1"}
    assert metrics == json.loads(Path(run.file("metrics.json")).read_text())
    for name in ("recipe.yaml", "model.safetensors", "report.html"):
        assert Path(run.file(name)).stat().st_size > 100

    told = sorted(p.name for p in (tmp_path / "run" / "tensorboard").iterdir())
    assert told == [f"events.out.tfevents.{epoch:06d}" for epoch in (1, 2)]
    for epoch in (1, 2):
        picture = Image.open(tmp_path / "run" / "training" / "pictures" / f"epoch-{epoch:06d}.png")
        assert picture.size == (4 * SIDE, 3 * SIDE)  # six images with their masks, two a row

    def state() -> dict[str, int]:
        kept = ("recipe.yaml", "metrics.json", "report.html")
        return {str(p): p.stat().st_mtime_ns for p in Path(run.uri).rglob("*") if p.is_file() and p.name not in kept}

    # One of its stages again, for another recipe or for this one, leaves the run what it is.
    with refused("recipe-mismatch training.omega_1"):
        pipeline.run_stages(recipe.with_fields({"omega_1": 0.5}), run, until="concepts")
    assert pipeline.run_stages(recipe, run, until="concepts")["mean_iou"] == metrics["mean_iou"]

    before = state()
    capsys.readouterr()
    again = pipeline.run_stages(recipe, run)
    assert state() == before
    assert capsys.readouterr().out.count("complete already") == len(STAGES)
    assert all(stage["skipped"] for stage in again["stages"].values())
    assert again["mean_iou"] == metrics["mean_iou"]

    scored = pipeline.evaluate(run.recipe(), run, quiet=True)
    assert scored["mean_iou"] == metrics["mean_iou"]
    assert scored["images"] == IMAGES
    published = recipe.with_fields({"decoder.weights": run.file("model.safetensors")})
    assert pipeline.evaluate(published, None, quiet=True)["iou"] == metrics["iou"]


@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_without_labels_there_is_a_report_and_no_score(tmp_path: Path) -> None:
    photographs(tmp_path, labels=False)
    recipe = small(tmp_path, labels="", stuff=3, epochs=1)
    metrics = pipeline.run_stages(recipe, Run(str(tmp_path / "run")), report=page.write, quiet=True)
    assert metrics["mean_iou"] is None
    assert "no labels" in (tmp_path / "run" / "report.html").read_text().lower()
    with refused("labels-missing"):
        pipeline.evaluate(recipe, Run(str(tmp_path / "run")), quiet=True)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_may_have_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = small(tmp_path, epochs=1, track="none")
    metrics = pipeline.run_stages(recipe, Run("made/run"), quiet=True)
    assert metrics["mean_iou"] is not None
    assert (tmp_path / "made" / "run" / "model.safetensors").exists()


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_runs_share_stages_and_more_epochs_go_on(tmp_path: Path) -> None:
    photographs(tmp_path, labels=False)
    recipe = small(tmp_path, labels="", stuff=2, dropout=0.0, track="none")

    def train(name: str, shared: str = "", until: str = STAGES[-1], **fields: object) -> tuple[Run, list[str]]:
        """Return the run, and the stages that were computed."""
        run, other = Run(str(tmp_path / name)), Run(str(tmp_path / shared)) if shared else None
        metrics = pipeline.run_stages(recipe.with_fields(fields), run, until=until, shared=other, quiet=True)
        return run, [stage for stage, found in metrics["stages"].items() if not found["skipped"]]

    def state(run: Run) -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in Path(run.uri).rglob("*") if file.is_file()}

    first, computed = train("first", until="pseudo_labels")
    assert computed == ["samples", "features", "concepts", "pseudo_labels"]
    before = state(first)
    other_k, computed = train("other k", "first", until="pseudo_labels", stuff=3)
    assert computed == ["concepts", "pseudo_labels"]
    assert not Path(other_k.file("features")).exists()
    alone, _ = train("alone", until="pseudo_labels", stuff=3)
    for name in ("concepts/concepts.safetensors", "pseudo_labels/part-00000000.parquet"):
        assert Path(other_k.file(name)).read_bytes() == Path(alone.file(name)).read_bytes(), name
    other_omega, computed = train("other omega", "first", omega_1=0.5)
    assert computed == ["training", "evaluation"]
    assert state(first) == before

    # The same command goes on with it; more epochs go on after the last, as if there had been so many from the start.
    assert train("other omega", omega_1=0.5)[1] == []
    assert train("other omega", omega_1=0.5, epochs=3)[1] == ["training", "evaluation"]
    straight, _ = train("straight", "first", omega_1=0.5, epochs=3)
    assert [row["epoch"] for row in other_omega.history()] == [1, 2, 3]
    for name in ("model.safetensors", "training/last.safetensors"):
        found, wanted = (safetensors.numpy.load_file(run.file(name)) for run in (other_omega, straight))
        for tensor, value in wanted.items():
            np.testing.assert_allclose(found[tensor], value, atol=1e-6, err_msg=tensor)
    carried = [file for file in Path(other_omega.file("ray")).rglob("after-epoch-2") if file.is_dir()]
    assert len(carried) == 1
    assert not list(Path(straight.file("ray")).rglob("after-epoch-*"))
    verified = verify(other_omega)
    assert (verified.stages, verified.damage) == (STAGES, ())


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """What a run made of its images, in their order."""

    images: list[bytes]
    features: pa.Table
    pseudo_labels: pa.Table
    model: dict[str, np.ndarray]
    masks: list[np.ndarray]

    @classmethod
    def of(cls, run: Run) -> "Made":
        files = samples.load(run, "train")["image"].to_pylist()
        segmenter = Segmenter.load(run.uri)
        return cls(
            images=[Path(file).read_bytes() for file in files],
            features=pa.concat_tables(pq.read_table(part) for part in parts_of(run, "features")),
            pseudo_labels=pa.concat_tables(pq.read_table(part) for part in parts_of(run, "pseudo_labels")),
            model=safetensors.numpy.load_file(run.file("model.safetensors")),
            masks=[segmenter.predict(file) for file in files],
        )


def parts_of(run: Run, stage: str) -> list[Path]:
    return sorted(Path(run.artifact(stage).uri).glob("part-*.parquet"))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_every_input_comes_to_the_masks_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features, pseudo labels, model and masks are equal in all bits to those of the same images as files."""
    fsspec_config = pytest.importorskip("fsspec.config")
    photographs(tmp_path, labels=False)
    pack(tmp_path)
    inputs = {"tar": "shard.tar", "rows": "rows", "lance": Path(pack_lance(tmp_path)).name}
    common = small(tmp_path, labels="", epochs=1, dropout=0.0, track="none")  # once: it draws the encoder's weights

    def made(kind: str, data: str) -> Made:
        run, recipe = Run(str(tmp_path / f"run {kind}")), common.with_fields({"data": data})
        assert any("6 training images, 6 for validation" in line for line in dry_run.describe(recipe, run))
        pipeline.run_stages(recipe, run, quiet=True)
        assert verify(run).damage == ()
        return Made.of(run)

    wanted = made("files", str(tmp_path / "images"))
    assert len(wanted.images) == len(wanted.masks) == len(wanted.pseudo_labels) == IMAGES
    assert any(len(np.unique(mask)) > 1 for mask in wanted.masks)
    with hub.serving((tmp_path / "rows" / "0.parquet").read_bytes()) as url:
        monkeypatch.setitem(fsspec_config.conf, "hf", {"endpoint": url, "token": False})
        for kind, data in {**{name: str(tmp_path / path) for name, path in inputs.items()}, "hub": hub.URI}.items():
            found = made(kind, data)
            assert found.images == wanted.images, kind
            assert found.features.equals(wanted.features), kind
            assert found.pseudo_labels.equals(wanted.pseudo_labels), kind
            assert found.model.keys() == wanted.model.keys()
            for name, tensor in wanted.model.items():  # the files' metadata differ: they hold the recipes' digests
                np.testing.assert_array_equal(found.model[name], tensor, err_msg=f"{kind} {name}")
            np.testing.assert_array_equal(np.stack(found.masks), np.stack(wanted.masks), err_msg=kind)
    moved = Run(str(tmp_path / "moved"))
    (tmp_path / "run tar").rename(moved.uri)
    assert all(Path(uri).exists() for uri in samples.load(moved, "train")["image"].to_pylist())
