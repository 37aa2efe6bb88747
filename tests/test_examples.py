"""The examples in the public docstrings run and print what they show; the documentation site has the same text."""

import doctest
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.made_run import make_run
from transfgu import Segmenter
from transfgu.encoder import Encoder
from transfgu.pipeline import run_stages
from transfgu.stages.concepts import kmeans
from transfgu.stages.prediction import predict


def run_examples(documented: Any) -> None:
    test = doctest.DocTestParser().get_doctest(documented.__doc__, {}, documented.__qualname__, None, None)
    assert test.examples, f"{documented.__qualname__} shows no example"
    told: list[str] = []
    failed, _ = doctest.DocTestRunner().run(test, out=told.append)
    assert not failed, "".join(told)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate home folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def demonstration(home: Path, tmp_path: Path) -> None:
    """A run in the place of `make demo`'s, with the same classes."""
    shutil.copytree(make_run(tmp_path).run.uri, home / "transfgu" / "shapes")


def test_kmeans() -> None:
    run_examples(kmeans)


def test_encoder() -> None:
    run_examples(Encoder)


@pytest.mark.usefixtures("demonstration")
def test_segmenter() -> None:
    run_examples(Segmenter)


@pytest.mark.ray
@pytest.mark.usefixtures("small_work_here", "home")
def test_train() -> None:
    run_examples(run_stages)


@pytest.mark.ray
@pytest.mark.usefixtures("small_work_here", "demonstration")
def test_predict() -> None:
    run_examples(predict)
