"""The layers of `transfgu`: a module imports only from its own layer and those below it, without circles.

Every import counts, including those inside functions and under `if TYPE_CHECKING`.
"""

import ast
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "transfgu"

LAYERS: Mapping[str, tuple[str, ...]] = {
    "ground": ("errors", "formats", "fields"),
    "recipe": ("recipe", "presets", "methods"),
    "store": ("store",),  # below the method, as the encoder reads its weights through it
    "method": (
        "windows",
        "encoder",
        "whitening",
        "kmeans",
        "device_kmeans",
        "cluster_numbers",
        "maps",
        "decoder",
        "dropout",
        "losses",
        "views",
        "metrics",
        "transfer",
        "workers",
    ),
    "datasets": ("datasets",),
    "inference": ("inference", "learner"),
    "methods": ("baselines",),  # below the segmenter, which predicts by any method
    "sharing": ("sharing",),  # below the segmenter, whose methods write the model card and the ONNX files
    "segmenter": ("segmenter",),
    "runtime": ("runtime",),
    "training": ("training",),
    "stages": ("stages",),
    "runs": (
        *("pipeline", "naming", "verification", "search", "pretraining"),
        *("baselines.masks", "baselines.tokens", "baselines.comparison"),
    ),
    "accounts": ("report", "planning", "benchmarks"),
    "cli": ("cli", "__main__"),
    "package": ("",),  # the package itself, which offers `Segmenter`
}
"""Layers from the ground up. Modules of one layer may import from each other, without circles."""

RAY = ("runtime", "training", "stages", "search", "pretraining", "benchmarks")
"""Layers that may import Ray."""

UPWARD = "a layer imports from those below it"
CIRCLE = "a circle of imports"
FENCED = (
    "DataContext",
    "ENABLE_RAY_CLUSTER",
    "ExecutionResources",
    "get_stats_summary",
    "map_batches_internal",
)
"""Private and developer APIs of Ray, by their last name."""

FENCE = "a private or developer API of Ray stands in runtime alone"
NO_RAY = f"Ray is imported in {', '.join(RAY)} alone"


@dataclass(frozen=True)
class Arrow:
    """One import: `target` is a module by its dotted name within the package, or `ray`."""

    file: Path
    line: int
    importer: str
    target: str


def modules(package: Path) -> dict[str, Path]:
    """Return every module below `package` by its dotted name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(node: ast.AST, importer: str, is_package: bool, name: str) -> list[str]:
    """Return the absolute dotted names of an import statement; empty for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        here = [name, *filter(None, importer.split("."))]
        up = node.level - int(is_package)
        base = ".".join(filter(None, [*here[: len(here) - up], base]))
    return [f"{base}.{alias.name}" for alias in node.names]


def arrows(package: Path) -> Iterator[Arrow]:
    """Every import of the package's modules, and of Ray."""
    known, name = modules(package), package.name
    for importer, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            for target in imported(node, importer, file.stem == "__init__", name):
                line: int = node.lineno  # type: ignore[attr-defined]  # a statement has one
                if target.split(".")[0] == "ray":
                    yield Arrow(file, line, importer, "ray")
                elif target.split(".")[0] == name:
                    inner = target.removeprefix(name).removeprefix(".")
                    while inner and inner not in known:
                        inner = inner.rpartition(".")[0]
                    yield Arrow(file, line, importer, inner)


def layer_of(module: str) -> str:
    """Return the name of a module's layer."""
    for room in (module, module.partition(".")[0]):  # a module may be in another layer than its room
        found = [layer for layer, rooms in LAYERS.items() if room in rooms]
        if found:
            return found[0]
    raise AssertionError(f"{module} has no layer: add its room to LAYERS")


def violations(package: Path) -> list[str]:
    """Yield each import that breaks a rule: `file:line: importer (layer) imports target (layer): rule`."""
    found = []
    order = list(LAYERS)
    all_arrows = list(dict.fromkeys(arrows(package)))
    graph: dict[str, set[str]] = {module: set() for module in modules(package)}
    for arrow in all_arrows:
        if arrow.target != "ray":
            graph[arrow.importer].add(arrow.target)
    for arrow in all_arrows:
        layer = layer_of(arrow.importer)
        where = f"{arrow.file.relative_to(package.parent)}:{arrow.line}: {arrow.importer} ({layer}) imports"
        if arrow.target == "ray":
            if arrow.importer.partition(".")[0] not in RAY:
                found.append(f"{where} ray: {NO_RAY}")
            continue
        target = layer_of(arrow.target)
        if order.index(target) > order.index(layer):
            found.append(f"{where} {arrow.target} ({target}): {UPWARD}")
        if back := path(graph, arrow.target, arrow.importer):
            circle = " -> ".join([arrow.importer, *back])
            found.append(f"{where} {arrow.target} ({target}): {CIRCLE}, {circle}")
    return found


def private_names(package: Path) -> list[str]:
    """Yield each use of a private or developer API of Ray outside runtime: `file:line: name: rule`."""
    found = []
    for module, file in modules(package).items():
        if module.partition(".")[0] == "runtime":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                targets = [name.split(".") for name in imported(node, module, file.stem == "__init__", package.name)]
                of_ray = [parts for parts in targets if parts[0] == "ray"]
                names = [".".join(parts) for parts in of_ray if any(part.startswith("_") for part in parts)]
                names += [parts[-1] for parts in of_ray]
            else:
                continue
            where = file.relative_to(package.parent)
            found += [
                f"{where}:{node.lineno}: {name}: {FENCE}" for name in names if name in FENCED or name.startswith("ray.")
            ]
    return found


def path(graph: Mapping[str, set[str]], start: str, end: str) -> list[str]:
    """Return the shortest path from `start` to `end` along the arrows, including both; empty if there is none."""
    ways, seen = [[start]], {start}
    while ways:
        way = ways.pop(0)
        if way[-1] == end:
            return way
        for target in sorted(graph[way[-1]] - seen):
            seen.add(target)
            ways.append([*way, target])
    return []


def test_imports_keep_the_layers() -> None:
    assert violations(PACKAGE) == []


def test_private_names_of_ray_stand_in_runtime() -> None:
    assert private_names(PACKAGE) == []


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("def late() -> None:\n    from ray._private import services", "ray._private.services"),
        ("from ray.data import DataContext", "DataContext"),
        ("def late(data):\n    return data.map_batches_internal(len)", "map_batches_internal"),
    ],
)
def test_a_planted_private_name_is_named(tmp_path: Path, planted: str, name: str) -> None:
    package = tmp_path / "transfgu"
    (package / "stages").mkdir(parents=True)
    (package / "stages" / "features.py").write_text(f"{planted}\n")
    line = len(planted.splitlines())
    assert private_names(package) == [f"transfgu/stages/features.py:{line}: {name}: {FENCE}"]


def test_every_layer_is_there() -> None:
    rooms = {module.partition(".")[0] for module in modules(PACKAGE)}
    assert rooms == {room.partition(".")[0] for layer in LAYERS.values() for room in layer}


PLANTED = {
    "losses.py": (
        "from transfgu.stages import features",
        f"losses (method) imports stages.features (stages): {UPWARD}",
    ),
    "maps.py": (
        "def late() -> None:\n    from transfgu import pipeline",
        f"maps (method) imports pipeline (runs): {UPWARD}",
    ),
    "store/parquet.py": (
        "if TYPE_CHECKING:\n    import transfgu.runtime.parts",
        f"store.parquet (store) imports runtime.parts (runtime): {UPWARD}",
    ),
    "decoder.py": ("import ray.data", f"decoder (method) imports ray: {NO_RAY}"),
    "dropout.py": (
        "from .decoder import MaskDecoder",
        f"dropout (method) imports decoder (method): {CIRCLE}, dropout -> decoder -> dropout",
    ),
}
"""Imports that break a rule, by the file to which each is added, and the expected report of each."""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The violations in a copy of the package with all of `PLANTED`."""
    package = tmp_path_factory.mktemp("copy") / "transfgu"
    shutil.copytree(PACKAGE, package, ignore=lambda _, names: [n for n in names if "." in n and not n.endswith(".py")])
    for file, (planted, _) in PLANTED.items():
        with (package / file).open("a") as module:
            module.write(f"\n{planted}\n")
    return violations(package)


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_import_is_named(reported: list[str], file: str) -> None:
    planted, told = PLANTED[file]
    line = len((PACKAGE / file).read_text().splitlines()) + 1 + len(planted.splitlines())
    assert f"transfgu/{file}:{line}: {told}" in reported
