"""The file system that can be pickled: it behaves like pyarrow's own, and contains nothing but the scheme."""

import pickle
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from transfgu.store import storage


@pytest.mark.parametrize("kind", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
def test_it_does_what_the_processes_own_does(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = storage.join(request.getfixturevalue("s3") if kind == "s3" else str(tmp_path), "run")
    made, path = storage.travelling(uri)
    pickled = pickle.dumps(made)
    assert b"of-the-tests" not in pickled  # the keys of the fixture
    fs = pickle.loads(pickled)
    assert fs == made
    fs.create_dir(f"{path}/a", recursive=True)
    with fs.open_output_stream(f"{path}/a/x") as stream:
        stream.write(b"one")
    assert storage.read_bytes(f"{uri}/a/x") == b"one"
    fs.copy_file(f"{path}/a/x", f"{path}/a/y")
    fs.move(f"{path}/a/y", f"{path}/a/z")
    assert [i.path for i in fs.get_file_info(pafs.FileSelector(f"{path}/a"))] == [f"{path}/a/{n}" for n in "xz"]
    with fs.open_input_file(f"{path}/a/z") as file:
        assert file.read() == b"one"
    local = tmp_path / "copy"
    local.mkdir()
    pafs.copy_files(f"{path}/a", str(local), source_filesystem=fs)
    assert sorted(p.name for p in local.iterdir()) == ["x", "z"]
    fs.delete_file(f"{path}/a/z")
    fs.delete_dir_contents(f"{path}/a")
    assert fs.get_file_info(f"{path}/a/x").type == pafs.FileType.NotFound
    fs.delete_dir(f"{path}/a")
