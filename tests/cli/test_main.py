"""The command `transfgu`: every command answers quickly, and `jobs/` run the same commands."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import transfgu
from tests.refusals import refused
from transfgu.cli import completion, evaluate, schema, train
from transfgu.cli.command_line import COMMON, given_fields
from transfgu.cli.main import COMMANDS, help_text, run_command
from transfgu.errors import UserError
from transfgu.presets import PRESETS
from transfgu.recipe import FIELDS, from_yaml, preset
from transfgu.store.artifacts import Run

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted({path.stem for path in (ROOT / "jobs").glob("*.py")} & set(COMMANDS))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            run_command([name, flag])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: transfgu {name}")


def test_the_help_names_every_command() -> None:
    for name, what in COMMANDS.items():
        assert f"  {name} " in help_text()
        assert what in help_text()


@pytest.mark.parametrize("job", JOBS)
def test_a_job_of_the_clone_runs_the_command_of_its_name(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("transfgu.cli.main.main", called.append)  # it would install handlers of signals, and exit
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", "--seed", "1"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    assert called == [[job, "--seed", "1"]]


def test_an_unknown_command_is_answered_in_one_line() -> None:
    with refused("command-unknown evaluate"):
        run_command(["evaluat"])


@pytest.mark.processes
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "folder", "--help"]])
def test_it_answers_without_torch_and_ray(words: list[str]) -> None:
    command = [sys.executable, "-m", "transfgu", *words]
    # Measured for coverage it would take longer.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}

    def seconds_of_a_core() -> float:
        before = os.times()
        subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=environment)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(seconds_of_a_core() < 0.5 for _ in range(3))
    listed = subprocess.run([*command[:1], "-X", "importtime", *command[1:]], capture_output=True, text=True, cwd=ROOT)
    loaded = {line.rpartition("|")[2].strip() for line in listed.stderr.splitlines()}
    assert not loaded & {"torch", "ray", "timm", "pandas"}


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["--version"])
    assert capsys.readouterr().out == f"transfgu {transfgu.__version__}\n"


def test_help_is_short_and_shows_the_defaults_of_the_preset_that_is_named() -> None:
    parser = train.parser(["lip-5"])
    shown, everything = parser.short_help(), " ".join(parser.format_help().split())
    assert "--epochs, --training.epochs N" in shown
    assert "(default: 100)" in shown
    assert "--weight_decay" not in shown
    assert "Defaults are those of preset lip-5" in shown
    assert "--weight_decay" in everything
    assert "pixels, height width] (default: 480x240)" in everything
    of_fields = sum(f"--{name} " in shown for name in FIELDS)
    hidden = int(shown.split("--help-all shows ")[1].split()[0])
    assert of_fields == len(COMMON)
    of_others = len(preset("lip-5").others_fields())
    assert of_fields + hidden == len(FIELDS) - of_others  # the preset is no flag, and --published no field


def test_a_command_shows_its_own_settings_and_takes_the_recipes_others() -> None:
    parser = evaluate.parser(["coco-stuff-27"])
    shown = parser.format_help()
    assert "--protocol, --evaluation.protocol" in shown
    assert "--omega_1" not in shown
    assert "--windows.scales" not in shown
    given = parser.parse(["coco-stuff-27", "--omega_1", "0.5", "--protocol", "label"])
    assert given_fields(given) == {"training.omega_1": "0.5", "evaluation.protocol": "label"}


def test_print_config_is_the_recipe_that_the_run_would_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["folder", "--data", "/x", "--epochs", "3", "--run", str(tmp_path / "run"), "--print-config"]
    train.main(words)
    printed = capsys.readouterr().out
    assert from_yaml(printed) == preset("folder").with_fields({"data": "/x", "epochs": 3})
    assert not (tmp_path / "run").exists()
    # A run that is there keeps its own values of fields that nobody gave, though the preset has changed since.
    (tmp_path / "run").mkdir()
    Path(Run(str(tmp_path / "run")).file("recipe.yaml")).write_text(printed.replace("seed: 2021", "seed: 7"))
    train.main(words)
    assert from_yaml(capsys.readouterr().out).seed == 7
    for command in ("evaluate", "tune --trials 1", "benchmark --preset", "plan --images 1 --gpus 1"):
        run_command([*command.split(), "folder", "--data", "/x", "--print-config"])
        assert from_yaml(capsys.readouterr().out).data == "/x"
    run_command(["pretrain", "--out", "x.safetensors", "--print-config", "--depth", "2"])
    assert "depth: 2\n" in capsys.readouterr().out


def test_the_schema_takes_every_recipe_and_refuses_others() -> None:
    import yaml

    found = schema.schema()
    jsonschema.Draft202012Validator.check_schema(found)
    check = jsonschema.Draft202012Validator(found).is_valid
    for name in PRESETS:
        assert check(yaml.safe_load(preset(name).to_yaml()))
    assert check({"preset": "folder", "epochs": 4, "training.lr": 0.1, "windows": {"scales": [0.5]}})
    wrong = ({"preset": "coco"}, {"epohcs": 4}, {"epochs": "many"}, {"dataset": {"image_size": [320]}}, {"format": 99})
    for tree in wrong:
        assert not check(tree), tree
    assert json.loads(json.dumps(found)) == found


_COMPLETE = """
source {script}
COMP_WORDS=({words}); COMP_CWORD={place}
_shtab_transfgu transfgu "${{COMP_WORDS[COMP_CWORD]}}"
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The completion script for bash."""
    script = tmp_path_factory.mktemp("completion") / "transfgu.bash"
    script.write_text(completion.script("bash"))
    return script


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("transfgu tr", {"train"}),
        ("transfgu train city", {"cityscapes"}),
        ("transfgu train --until pseudo", {"pseudo_labels"}),
        ("transfgu evaluate --protocol s", {"stego"}),
        ("transfgu train --epo", {"--epochs"}),
        ("transfgu completion z", {"zsh"}),
    ],
)
def test_bash_completes(words: str, expected: set[str], bash: Path) -> None:
    program = _COMPLETE.format(script=bash, words=words, place=len(words.split()) - 1)
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_other_shells_get_scripts() -> None:
    assert "#compdef transfgu" in completion.script("zsh")
    assert "complete -c transfgu" in completion.script("fish")
    with pytest.raises(UserError) as caught:
        completion.script("ksh")
    assert caught.value.code == "shell-unknown"


@pytest.mark.long
def test_the_wheel_brings_the_command(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "fresh")], check=True)
    fresh = tmp_path / "fresh" / "bin"
    subprocess.run([fresh / "python", "-m", "pip", "--quiet", "install", "--no-deps", str(wheel)], check=True)
    for words in (["--version"], ["--help"]):
        done = subprocess.run([fresh / "transfgu", *words], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert transfgu.__version__ in done.stdout or "usage: transfgu" in done.stdout
    # With the dependencies of this environment in reach, a command runs.
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    here = Path(jsonschema.__file__).parents[1]
    (site / "dependencies.pth").write_text(str(here))
    done = subprocess.run([fresh / "transfgu", "train", "--list"], capture_output=True, text=True, cwd=tmp_path)
    assert "cityscapes" in done.stdout, done.stderr


@pytest.mark.processes
def test_without_faiss_one_line_names_the_remedy(tmp_path: Path) -> None:
    program = "import sys; sys.modules['faiss'] = None; from transfgu.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "train", "shapes", "--run", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.rstrip().endswith("[faiss-missing]"), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
