"""The checkpoint from which training resumes is the newest complete one, whatever happened to the others."""

import json
from pathlib import Path

import pytest
import torch

from transfgu.store import storage
from transfgu.training import checkpoints
from transfgu.training.state import State, read


def write(folder: Path, name: str, epochs: int) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    (made / "history.json").write_text(json.dumps([{"epoch": e + 1} for e in range(epochs)]))
    (made / "student.safetensors").write_bytes(bytes(range(epochs, 200)))
    checkpoints.seal(made)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for epochs in (1, 2, 3):
        write(tmp_path, f"checkpoint_{epochs}", epochs)
    return tmp_path


def test_the_newest_is_that_of_the_most_epochs(folder: Path) -> None:
    said: list[str] = []
    (folder / "snapshot.json").write_text("{}")
    write(folder, "checkpoint_0_by_a_late_clock", 4)
    found = checkpoints.newest(str(folder), said.append)
    assert found is not None
    assert found.uri == str(folder / "checkpoint_0_by_a_late_clock")
    assert [row["epoch"] for row in found.history] == [1, 2, 3, 4]
    assert said == []


@pytest.mark.parametrize("file", ["student.safetensors", "history.json", "digests.json"])
@pytest.mark.parametrize("damage", ["cut short", "gone", "other bytes"])
def test_a_damaged_one_is_passed_over(folder: Path, file: str, damage: str) -> None:
    last = folder / "checkpoint_3" / file
    if damage == "gone":
        last.unlink()
    else:
        data = last.read_bytes()
        last.write_bytes(data[:-9] if damage == "cut short" else data[:-9] + b"123456789")
    said: list[str] = []
    found = checkpoints.newest(str(folder), said.append)
    assert found is not None
    assert found.uri == str(folder / "checkpoint_2")
    assert len(found.history) == 2
    if (file, damage) != ("digests.json", "gone"):  # an upload that was never finished
        assert said == ["checkpoint checkpoint_3 is damaged: continuing from the previous one"]


def test_without_a_whole_one_there_is_none(tmp_path: Path) -> None:
    assert checkpoints.newest(str(tmp_path / "nothing")) is None
    (write(tmp_path, "checkpoint_1", 1) / "student.safetensors").unlink()
    assert checkpoints.newest(str(tmp_path)) is None


def test_downloaded_it_is_what_was_written(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    checkpoints.download(str(folder / "checkpoint_3"), there)
    for file in (folder / "checkpoint_3").iterdir():
        assert (there / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_3"}]}', True),
        ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_9"}]}', False),
        ('{"checkpoint_results": [{"check', False),
        ("", False),
    ],
)
def test_rays_account_is_kept_if_it_is_true(folder: Path, text: str, kept: bool) -> None:
    account = folder / "checkpoint_manager_snapshot.json"
    account.write_text(text)
    checkpoints.mend_account(str(folder))
    assert storage.exists(str(account)) is kept


def test_later_steps_do_not_change_a_snapshot(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 1, bias=False)
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.5)
    state = State(student=network, optimiser=optimiser)
    torch.nn.init.zeros_(network.weight)
    further = torch.zeros(1)

    def step() -> None:
        optimiser.zero_grad()
        network(torch.ones(1, 2)).sum().backward()  # the gradient is 1 everywhere
        optimiser.step()
        further.add_(1)
        state.history.append({"epoch": len(state.history) + 1})

    step()
    state.promote()
    state.best = {"weight": network.weight.detach().clone()}
    snapshot = state.snapshot({"a": "b"}, {"further": {"count": further}})
    step()
    assert state.teacher
    for tensor in (*state.teacher.state_dict().values(), *state.best.values()):
        tensor.fill_(9.0)
    snapshot.save(tmp_path)
    assert checkpoints.is_whole(str(tmp_path))
    tensors, history = read(tmp_path, torch.device("cpu"))
    assert history == [{"epoch": 1}]
    after = {name: {key: tensor.flatten().tolist() for key, tensor in of.items()} for name, of in tensors.items()}
    assert after == {
        "student": {"weight": [-1.0, -1.0]},
        "moments": {"weight:momentum_buffer": [1.0, 1.0]},
        "best": {"weight": [-1.0, -1.0]},
        "teacher": {"weight": [-1.0, -1.0]},
        "further": {"count": [1.0]},
    }
