"""Names and merges as a table of integers, and the syntax of users' files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from transfgu.sharing import names
from transfgu.store.artifacts import Run

CLASSES = ("sky", "concept 1", "concept 2", "concept 3")
COLOURS = ((0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 4))


def test_classes_of_one_name_are_one_class() -> None:
    table = names.named(CLASSES, COLOURS, {1: "cow", 3: "cow"})
    assert table.names == ("sky", "cow", "concept 2")
    assert table.colours == ((0, 0, 1), (0, 0, 2), (0, 0, 3))
    assert table.index_of.tolist() == [0, 1, 2, 1]
    assert table.merged
    assert table.ignored == 0


def test_what_is_ignored_is_the_last_class() -> None:
    table = names.named(CLASSES, COLOURS, {0: "ignore", 2: "sky"})
    assert table.names == ("concept 1", "sky", "concept 3", "ignore")
    assert table.index_of.tolist() == [3, 0, 1, 2]
    assert table.merged
    assert table.ignored == 1


def test_names_alone_move_nothing() -> None:
    table = names.named(CLASSES, COLOURS, {2: "road"})
    assert table.names == ("sky", "concept 1", "road", "concept 3")
    assert table.index_of.tolist() == [0, 1, 2, 3]
    assert not table.merged


@given(st.dictionaries(st.integers(0, 5), st.sampled_from(["a", "b", "c 4", "ignore"])))
def test_two_classes_share_an_index_exactly_where_they_share_a_name(chosen: dict[int, str]) -> None:
    before = tuple(f"c {i}" for i in range(6))
    table = names.named(before, COLOURS * 2, chosen)
    new = [chosen.get(i, name) for i, name in enumerate(before)]
    assert [table.names[index] for index in table.index_of] == new
    assert sorted(set(table.index_of.tolist())) == list(range(len(table.names)))
    assert len(table.colours) == len(table.names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{3: cow, 0: ignore}", {3: "cow", 0: "ignore"}),
        ("concept 2: a  cow\n1: 7", {2: "a cow", 1: "7"}),
        ("[sky, road, car, tree]", {0: "sky", 1: "road", 2: "car", 3: "tree"}),
        ("sky\nroad\n\ntall tree\ncar\n", {0: "sky", 1: "road", 2: "tall tree", 3: "car"}),
    ],
)
def test_what_may_be_written(text: str, expected: dict[int, str]) -> None:
    assert names.parse(text, CLASSES, "names.yaml") == expected


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{4: cow}", "names-class-unknown"),
        ("{concept 9: cow}", "names-class-unknown"),
        ("{true: cow}", "names-class-unknown"),
        ("{1: no}", "names-unreadable"),
        ("{1: }", "names-unreadable"),
        ("{1: [a]}", "names-unreadable"),
        ("{1", "names-unreadable"),
        pytest.param("[" * 100_000, "names-unreadable", id="nested"),
        ("", "names-unreadable"),
        ("[a, b]", "names-count"),
        (b"\xff\xfe", "names-unreadable"),
    ],
)
def test_mistakes(text: str | bytes, code: str) -> None:
    with refused(f"{code} names.yaml"):
        names.parse(text, CLASSES, "names.yaml")


def test_a_run_keeps_names_until_they_are_taken_back(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    assert names.read(run) == {}
    names.write(run, {3: "no", 1: "Straße: 1"})
    assert names.read(run) == {1: "Straße: 1", 3: "no"}
    (tmp_path / "names.yaml").write_text("names: 3")
    with refused("file-damaged names.yaml"):
        names.read(run)
    names.write(run, {})
    assert not (tmp_path / "names.yaml").exists()
    names.write(run, {})


def test_indices_are_integers_that_index() -> None:
    table = names.named(CLASSES, COLOURS, {})
    assert np.issubdtype(table.index_of.dtype, np.integer)
