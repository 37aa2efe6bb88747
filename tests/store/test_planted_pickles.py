"""A pickle that runs code when it is read, in place of each file of a run: refused, or never read."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.data.extensions import ArrowPythonObjectType

from tests.made_run import MadeRun, make_run
from tests.refusals import refused
from transfgu import Segmenter
from transfgu.datasets import map_files
from transfgu.decoder import MaskDecoder
from transfgu.encoder import Encoder
from transfgu.errors import UserError
from transfgu.inference.mask_model import MaskModel
from transfgu.inference.tokens import PatchTokens
from transfgu.pretraining import stage
from transfgu.pretraining.training import read_small_images
from transfgu.recipe import Recipe
from transfgu.report import page
from transfgu.runtime import parts
from transfgu.stages import concepts, evaluation, prediction, pseudo_labels, samples
from transfgu.stages.training import training_images
from transfgu.store.artifacts import Run
from transfgu.training import checkpoints
from transfgu.training.job import Place
from transfgu.training.scoring import Mirror, Validation


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._canary}",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def run(made: MadeRun, tmp_path: Path) -> Run:
    shutil.copytree(made.run.uri, tmp_path / "run")
    return Run(str(tmp_path / "run"))


def test_it_does_run_code_where_it_is_unpickled(canary: Path) -> None:
    pickle.loads(pickle.dumps(Planted(canary)))
    assert canary.exists()


READERS: dict[str, tuple[str, Callable[[MadeRun, Run, str], object]]] = {
    "decoder, as a model": ("model.safetensors", lambda made, run, _: Segmenter.load(run.uri)),
    "decoder, evaluated": ("model.safetensors", lambda made, run, uri: evaluation.check_decoder(made.recipe, uri)),
    "decoder of another kind": ("decoder.pth", lambda made, run, uri: evaluation.check_decoder(made.recipe, uri)),
    "encoder": ("encoder.pth", lambda made, run, uri: Encoder.from_pretrained("tiny", uri)),
    "list of samples": ("samples/train.parquet", lambda made, run, _: samples.load(run, "train")),
    "features": (
        "features/part-00000000.parquet",
        lambda made, run, uri: concepts.read_parts([[uri]], concepts.groups_of(made.recipe)),
    ),
    "concepts": ("concepts/concepts.safetensors", lambda made, run, _: pseudo_labels.load_centroids(run)),
    "pseudo labels": ("pseudo_labels/part-00000000.parquet", lambda made, run, _: training_images(run)),
    "manifest": ("features/manifest.json", lambda made, run, _: run.artifact("features").manifest()),
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_planted_in_a_file_it_is_refused_in_one_line(
    what: str, protocol: str, made: MadeRun, run: Run, canary: Path
) -> None:
    name, read = READERS[what]
    file = Path(run.file(name))
    file.parent.mkdir(exist_ok=True)
    if protocol == "pickle":
        file.write_bytes(pickle.dumps(Planted(canary)))
    else:
        torch.save({"cls_emb": Planted(canary)}, file)
    with pytest.raises(UserError) as told:
        read(made, run, str(file))
    assert "\n" not in str(told.value)
    assert not canary.exists()


def column(form: str, canary: Path) -> pa.Array:
    """A row that is, contains or is described by the pickle, because any file may name the types that Ray registers."""
    pickled = pickle.dumps(Planted(canary))
    values = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), pa.array([pickled], pa.large_binary()))
    forms: dict[str, Callable[[], pa.Array]] = {
        "column": lambda: values,
        "list": lambda: pa.ListArray.from_arrays([0, 1], values),
        "struct": lambda: pa.StructArray.from_arrays([pa.ListArray.from_arrays([0, 1], values)], ["inner"]),
        "map": lambda: pa.MapArray.from_arrays([0, 1], pa.array(["key"]), values),
        "description": lambda: pa.array([[1]], pa.list_(pa.int64())),
    }
    return forms[form]()


def plant(file: Path, form: str, canary: Path) -> None:
    """A Parquet file of one row, with the column names of all readers."""
    made = column(form, canary)
    names = "index name image label curated group feature y0 x0 y1 x1 maps h w part row pixels concept distance"
    metadata = None
    if form == "description":
        described = {"name": "ray.data.arrow_tensor_v2", "metadata": pickle.dumps(Planted(canary))}
        metadata = {f"ARROW:extension:{key}": value for key, value in described.items()}
    schema = pa.schema([pa.field(name, made.type, metadata=metadata) for name in names.split()])
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table([made] * len(schema), schema), file)


@pytest.mark.parametrize("form", ["column", "list", "struct", "map"])
def test_in_parquet_it_does_run_code_where_arrow_alone_reads(form: str, tmp_path: Path, canary: Path) -> None:
    plant(tmp_path / "any.parquet", form, canary)
    pq.read_table(tmp_path / "any.parquet").to_pylist()
    assert canary.exists()


def scoring(made: MadeRun, uri: str) -> tuple[Recipe, str, MaskModel, Place]:
    encode = PatchTokens(made.recipe.encoder, torch.device("cpu"))
    decoder = MaskDecoder(encode.encoder.width, made.recipe.classes, num_heads=encode.encoder.num_heads)
    return made.recipe, uri, MaskModel(encode, decoder), Place(device=encode.device, rank=0, world=1)


PARQUET: dict[str, tuple[str, Callable[[MadeRun, Run, str], object]]] = {
    **{what: reader for what, reader in READERS.items() if reader[0].endswith(".parquet")},
    "labelled images": ("samples/validation.parquet", lambda made, run, _: samples.labelled(made.recipe, run)),
    "maps": (
        "pseudo_labels/part-00000000.parquet",
        lambda made, run, uri: map_files.read_maps(pa.table({"part": [uri], "row": [0]})),
    ),
    "windows of the report": (
        "concepts/nearest.parquet",
        lambda made, run, _: page.concept_views(made.recipe, run, Segmenter.load(run.uri)),
    ),
    "images that training scores": (
        "training/validation.parquet",
        lambda made, run, uri: Validation(*scoring(made, uri)),
    ),
    "images that the search compares on": (
        "pseudo_labels/unlabelled.table",
        lambda made, run, uri: Mirror(*scoring(made, uri)),
    ),
    "masks": ("masks/part-0.parquet", lambda made, run, uri: prediction.names_in(uri)),
    "part to pretrain on, counted": (
        "images/part-00000000.parquet",
        lambda made, run, uri: stage.make_part({"part": uri, "names": ["0"]}, lambda name: [], 8),
    ),
    "part to pretrain on": (
        "images/part-00000000.parquet",
        lambda made, run, uri: read_small_images(pa.table({"part": [uri], "row": [0]}), side=8),
    ),
}


@pytest.mark.parametrize("what", PARQUET)
@pytest.mark.parametrize("form", ["column", "list", "struct", "map", "description"])
def test_planted_as_a_type_in_parquet_it_is_damage(what: str, form: str, made: MadeRun, run: Run, canary: Path) -> None:
    name, read = PARQUET[what]
    file = Path(run.file(name))
    plant(file, form, canary)
    with refused(f"file-damaged {file.name}"):
        read(made, run, str(file))
    assert not canary.exists()


def test_planted_as_a_part_it_is_made_anew(tmp_path: Path, canary: Path) -> None:
    part = tmp_path / "part-00000000.parquet"
    plant(part, "column", canary)
    summary = parts.Summary(part=0, images=1, left_out=(), counts={})
    written = pq.read_table(part).replace_schema_metadata({"transfgu": summary.to_json()})
    pq.write_table(written, part)
    listed = pa.table({"index": pa.array([0], pa.int32())})
    assert parts.read_summary(str(part), listed) is None
    pq.write_table(listed.replace_schema_metadata(written.schema.metadata), part)  # but for the type it was whole
    assert parts.read_summary(str(part), listed) == summary
    assert not canary.exists()


def test_planted_as_a_checkpoint_it_is_passed_over(tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "checkpoint_1"
    folder.mkdir()
    for name in ("student.safetensors", "history.json", "digests.json", "anything.pkl"):
        (folder / name).write_bytes(pickle.dumps(Planted(canary)))
    assert checkpoints.newest(str(tmp_path)) is None
    assert not canary.exists()


def test_planted_in_rays_folder_it_is_not_read_to_predict(made: MadeRun, run: Run, canary: Path) -> None:
    for name in ("trainer.pkl", "tuner.pkl", "training-0/checkpoint_manager_snapshot.json", "training-0/x/a.pkl"):
        file = Path(run.file("ray")) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(Planted(canary)))
    Path(run.file("ray")).chmod(0)  # for all but root, reading would fail
    segmenter = Segmenter.load(run.uri)
    evaluation.check_decoder(made.recipe, run.file("model.safetensors"))
    assert segmenter.predict(samples.load(run, "validation")["image"][0].as_py()).ndim == 2
    Path(run.file("ray")).chmod(0o700)
    assert not canary.exists()
