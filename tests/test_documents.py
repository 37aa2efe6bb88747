"""The documents are correct: links have targets, flags exist, and the tutorial runs from end to end."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import transfgu
from tests.refusals import refused
from transfgu.cli import error_page, reference_page
from transfgu.cli import main as command_line
from transfgu.datasets import shapes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TUTORIAL = ROOT / "docs" / "tutorial-images.md"


def blocks(page: Path, language: str = "") -> list[str]:
    """Return the fenced blocks of a page, optionally those of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if not language or name == language]


_COMMAND = re.compile(rf"(?:python jobs/|transfgu )((?:{'|'.join(command_line.COMMANDS)})\b.*)")


def commands(page: Path) -> list[list[str]]:
    """Yield the words of every command line, of `transfgu` or of a job of the clone: the command, and its arguments."""
    lines = [line for text in blocks(page) for line in text.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python jobs/|transfgu )[^`\n]* --[^`\n]+)`", page.read_text())
    found = [match[1] for line in lines if (match := _COMMAND.search(line)) and "..." not in line]
    words = [shlex.split(re.split(" [>|] ", line)[0], comments=True) for line in found]
    return [[first.removesuffix(".py"), *rest] for first, *rest in words]


COMMANDS = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}") for page in PAGES for words in commands(page)
]


def test_the_recipes_page_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "recipe.md").read_text()
    assert written == reference_page.page(), "docs/recipe.md is out of date: make docs"


def test_the_page_of_errors_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "errors.md").read_text()
    assert written == error_page.page(), "docs/errors.md is out of date: make docs"


def test_each_mistake_has_a_code_that_names_the_thing_first() -> None:
    for mistake in error_page.mistakes():
        where = f"{mistake.module}:{mistake.line}"
        assert re.fullmatch(r"[a-z]+(-[a-z]+)+", mistake.code), f"{where} raises a UserError without a good code"
        assert re.sub(r"\*.*?\*", "", mistake.message), f"{where} raises a message that is written elsewhere"


def test_tests_match_codes_and_no_words() -> None:
    prose = re.compile(r"raises\(\s*UserError,\s*match")
    found = [path.name for path in (ROOT / "tests").rglob("*.py") if prose.search(path.read_text())]
    assert not found, f"{found}: use tests.refusals.refused in place of match="


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.processes
def test_a_folder_of_runs_is_not_taken_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "transfgu" / "photos").mkdir(parents=True)  # as in one's home
    script = tmp_path / "script.py"
    script.write_text("import transfgu; print(transfgu.__version__)")
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout.strip() == transfgu.__version__, ended.stderr


def test_the_site_shows_every_page_and_loads_nothing_from_elsewhere() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in site, f"{page.name} is missing from nav in mkdocs.yml"
    assert "http" not in site
    assert yaml.safe_load(site)["theme"]["font"] is False


def test_the_version_stands_in_one_place() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert transfgu.__version__ == version, "pyproject.toml has another version than the installed package: make setup"
    for name in ("transfgu/__init__.py", "CITATION.cff", "mkdocs.yml"):
        assert version not in (ROOT / name).read_text()


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("words", COMMANDS)
def test_every_flag_in_the_documents_exists(words: list[str]) -> None:
    # Unknown flags are told in their order: where the last one, which no command has, comes first, others are known.
    asked = [word for word in words if not word.startswith("--help")]
    with refused("flag-unknown --no-such-flag-anywhere"):
        command_line.run_command([*asked, "--no-such-flag-anywhere"])


# The real encoder's weights are not part of the project: with these the tutorial's long commands take moments.
_SMALL = (
    "--encoder.name vit_shapes --epochs 1 --dataset.image_size 64x64 --feature_size 128x128 --training_size 64x64 "
    "--windows.size 64x64"
)


def photographs(home: Path) -> None:
    for index in range(12):
        image, label = shapes.scene(5, "train", index, 96)
        for folder, name, pixels in (("photos/trip", f"{index}.jpg", image), ("labels/trip", f"{index}.png", label)):
            (home / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(home / folder / name)
    (home / "photos" / "broken.jpg").write_bytes(b"no picture")


@pytest.mark.ray
@pytest.mark.long
def test_the_tutorial_from_end_to_end(tmp_path: Path) -> None:
    photographs(tmp_path)
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def run(words: list[str], folder: Path = ROOT) -> str:
        ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    said: dict[str, str] = {}
    for words in commands(TUTORIAL):
        command, *given = [word.replace("~", str(tmp_path)) for word in words]
        if command in ("train", "check"):
            given += shlex.split(_SMALL)
        if "names.yaml" in given:  # which a user wrote
            given[given.index("names.yaml")] = str(tmp_path / "names.yaml")
            (tmp_path / "names.yaml").write_text("{1: concept cow, 2: concept cow}")
        if "--labels" in given:  # the scenes have ten classes
            given += ["--things", "6", "--stuff", "4"]
        said[" ".join(words)] = run([sys.executable, "-m", "transfgu", command, *given])
    report = tmp_path / "transfgu" / "photos" / "report.html"
    assert "unreadable image" in report.read_text()
    assert any("checked, nothing computed" in text for text in said.values())
    assert any("mIoU" in text for text in said.values())
    mask = np.asarray(Image.open(tmp_path / "masks" / "masks" / "trip" / "3.png"))
    assert mask.shape == (96, 96)
    assert mask.max() < 20
    (code,) = blocks(TUTORIAL, "python")
    assert run([sys.executable, "-c", code], tmp_path).startswith("concept ")
    assert (tmp_path / "photos-model" / "README.md").exists()
