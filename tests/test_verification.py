"""All files of a run's folder are read: damaged ones are named with the command that repairs them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch

from transfgu.cli import check
from transfgu.errors import UserError
from transfgu.store.artifacts import Run
from transfgu.training import checkpoints
from transfgu.verification import verify

GOLDEN = Path(__file__).parent / "golden" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "run")
    return tmp_path / "run"


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def not_finite(file: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    safetensors.torch.save_file(tensors, file)


def shorter(file: Path) -> None:
    """A complete Parquet file with one row less than in its summary."""
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)


def test_a_whole_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    found = verify(Run(str(run)))
    assert found.damage == ()
    assert found.files == len(before)
    assert len(found.stages) == 6
    check.main([str(run)])
    assert "0 damaged" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("name", "spoil", "named"),
    [
        ("features/part-00000000.parquet", cut, "features/part-00000000.parquet"),
        ("features/part-00000000.parquet", shorter, "features/part-00000000.parquet"),
        ("features/part-00000000.parquet", Path.unlink, "features"),
        ("pseudo_labels/part-00000000.parquet", shorter, "pseudo_labels/part-00000000.parquet"),
        ("concepts/concepts.safetensors", cut, "concepts/concepts.safetensors"),
        ("concepts/nearest.parquet", cut, "concepts/nearest.parquet"),
        ("samples/train.parquet", cut, "samples/train.parquet"),
        ("samples/scenes/train/images/000003.png", cut, "samples/scenes/train/images/000003.png"),
        ("training/last.safetensors", not_finite, "training/last.safetensors"),
        ("training/history.json", cut, "training/history.json"),
        ("evaluation/scores.json", cut, "evaluation/scores.json"),
        ("evaluation/manifest.json", cut, "evaluation/manifest.json"),
        ("metrics.json", cut, "metrics.json"),
        ("model.safetensors", cut, "model.safetensors"),
        ("model.safetensors", not_finite, "model.safetensors"),
        ("model.safetensors", Path.unlink, "model.safetensors"),
    ],
)
def test_damage_is_named_with_its_remedy(
    run: Path, name: str, spoil: Callable[[Path], None], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run / name)
    damage = verify(Run(str(run))).damage
    assert [found.file for found in damage] == [str(run / named)]
    assert f"run transfgu train shapes --run {run}" in damage[0].remedy or "run again" in damage[0].remedy
    with pytest.raises(SystemExit) as caught:
        check.main([str(run)])
    assert caught.value.code == 1
    assert str(run / named) in capsys.readouterr().out


def test_a_checkpoint_is_checked_by_its_digests(run: Path) -> None:
    folder = run / "ray" / "train" / "checkpoint_1"
    folder.mkdir(parents=True)
    (folder / "history.json").write_text(json.dumps([{"epoch": 1}]))
    checkpoints.seal(folder)
    assert verify(Run(str(run))).damage == ()
    (folder / "history.json").write_text(json.dumps([{"epoch": 2}]))
    assert [found.file for found in verify(Run(str(run))).damage] == [str(folder)]


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check.main([str(tmp_path)])
    assert caught.value.code == "run-missing"
