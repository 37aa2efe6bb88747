"""The layers of `transfgu`: a module imports from its own layer and from those below it, and from no circle.

Every import counts, those inside functions and under `if TYPE_CHECKING` too.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("errors",),
    ("formats",),
    ("recipe",),
    ("store",),
    ("windows", "kmeans", "maps", "decoder", "dropout", "losses", "views", "metrics", "encoder", "pictures"),
    ("datasets",),
    ("inference",),
    ("segmenter",),
    ("runtime",),
    ("training",),
    ("stages",),
    ("pretraining", "baselines"),
    ("report", "planning", "sharing", "search"),
    ("benchmarks",),
    ("pipeline",),
    ("cli",),
    ("",),  # the package itself, which offers `Segmenter`
)
"""From the ground; rooms of one layer may import from each other."""

RAY = ("runtime", "training", "stages", "search", "pretraining", "baselines", "benchmarks")
"""Rooms that may import Ray."""

LEFT: Mapping[tuple[str, str], str] = {
    ("segmenter", "sharing.model_card"): "the model hub's mixin asks the model itself for its card",
    ("segmenter", "sharing.onnx_export"): "`Segmenter.export_onnx` is public",
    ("search.stage", "pipeline"): "trials run the upstream stages by the pipeline's functions",
    ("planning.dry_run", "pipeline"): "a dry run makes the pipeline's checks",
    ("planning.dry_run", "ray"): "the plan says what the cluster holds",
}
"""Imports that are still to be turned round, and why they are there."""


@dataclass(frozen=True)
class Arrow:
    """One import."""

    file: Path
    line: int
    importer: str
    target: str


def modules(package: Path) -> dict[str, Path]:
    """Every module below `package` by its dotted name within it."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def arrows(package: Path) -> Iterator[Arrow]:
    """Every import of the package's modules, and of Ray."""
    known, name = modules(package), package.name
    for importer, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == "ray":
                    yield Arrow(file, node.lineno, importer, "ray")
                elif target.split(".")[0] == name:
                    inner = target.removeprefix(name).removeprefix(".")
                    while inner and inner not in known:
                        inner = inner.rpartition(".")[0]
                    yield Arrow(file, node.lineno, importer, inner)


def layer_of(module: str) -> int:
    room = module.partition(".")[0]
    found = [level for level, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{module} has no layer: add its room to LAYERS"
    return found[0]


def violations(package: Path) -> list[str]:
    """Each import that breaks a rule: `file:line: importer imports target: rule`."""
    found = []
    graph: dict[str, set[str]] = {module: set() for module in modules(package)}
    for arrow in arrows(package):
        where = f"{arrow.file.relative_to(package.parent)}:{arrow.line}: {arrow.importer} imports {arrow.target}"
        if (arrow.importer, arrow.target) in LEFT:
            continue
        if arrow.target == "ray":
            if arrow.importer.partition(".")[0] not in RAY:
                found.append(f"{where}: Ray is imported in {', '.join(RAY)} alone")
            continue
        if layer_of(arrow.target) > layer_of(arrow.importer):
            found.append(f"{where}: a layer imports from those below it")
        if arrow.target != arrow.importer:
            graph[arrow.importer].add(arrow.target)
    found += [f"circle of imports: {' -> '.join(circle)}" for circle in circles(graph)]
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """One circle for each module that can reach itself first."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_every_import_runs_downward() -> None:
    assert violations(ROOT / "transfgu") == []


def test_what_is_left_is_there() -> None:
    """An exception that nothing needs any more is deleted."""
    there = {(arrow.importer, arrow.target) for arrow in arrows(ROOT / "transfgu")}
    assert set(LEFT) <= there


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("losses.py", "from transfgu.stages import features", "losses imports stages.features: a layer imports"),
        ("store/parquet.py", "import transfgu.runtime.parts", "store.parquet imports runtime.parts: a layer imports"),
        ("maps.py", "def late():\n    from transfgu import pipeline", "maps imports pipeline: a layer imports"),
        ("decoder.py", "import ray.data", "decoder imports ray: Ray is imported in"),
        ("dropout.py", "from transfgu.decoder import MaskDecoder", "circle of imports: decoder -> dropout -> decoder"),
    ],
)
def test_a_planted_import_is_named(tmp_path: Path, file: str, line: str, told: str) -> None:
    package = tmp_path / "transfgu"
    for module in (ROOT / "transfgu").rglob("*.py"):
        copy = package / module.relative_to(ROOT / "transfgu")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(module.read_text())
    text = (package / file).read_text()
    (package / file).write_text(f"{text}\n{line}\n")
    # An upward import may close a circle as well, which is told beside it.
    (found,) = (violation for violation in violations(package) if told in violation)
    if not found.startswith("circle"):
        at = len(text.splitlines()) + 1 + len(line.splitlines())
        assert found.startswith(f"transfgu/{file}:{at}: ")
