"""Write the page about the recipe from the metadata of its fields.

`python -m transfgu.cli.reference_page docs/recipe.md` writes it (`make docs`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from transfgu.cli.command_line import GROUPS
from transfgu.fields import kind_name, written
from transfgu.presets import PRESETS
from transfgu.recipe import FIELDS, SHORT_NAMES, preset

_HEAD = """# The recipe

The result of a run depends only on its recipe. Every field below is a flag of `transfgu train`, by its full name
(`--training.epochs 4`) or its short name (`--epochs 4`), and a line of `recipe.yaml`, which a run writes and
`--recipe FILE` reads. Lists are written `0.5,0.4` or `320x320`.

*This page is written by `make docs` from the code; do not edit it.*
"""


def page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_HEAD, *_components(), *_presets()]) + "\n"


def _components() -> Iterator[str]:
    short = {full: name for name, full in SHORT_NAMES.items()}
    common, shapes = preset("folder").flat(), preset("shapes").flat()
    for component, title in GROUPS.items():
        yield f"## {title[0].upper()}{title[1:]}\n"
        yield "| field | short | default | type, unit | meaning |"
        yield "| --- | --- | --- | --- | --- |"
        for name, info in FIELDS.items():
            if name.rpartition(".")[0] != component or name == "preset":
                continue
            value = f"`{written(common[name])}`" if written(common[name]) else ""
            if shapes[name] != common[name]:
                value += f"; shapes: `{written(shapes[name])}`"
            kind = ", ".join(filter(None, (kind_name(info.kind), info.unit)))
            row = (f"`{name}`", f"`{short[name]}`" if name in short else "", value, kind, info.doc)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        yield ""


def _presets() -> Iterator[str]:
    yield "## Fields set by each preset\n"
    yield "Fields that differ from the defaults above, which are those of `folder`.\n"
    common = preset("folder").flat()
    for name in PRESETS:
        if name == "folder":
            continue
        flat = preset(name).flat()
        changed = [n for n in flat if flat[n] != common[n] and n != "preset"]
        yield f"**{name}**: " + ", ".join(f"`{n} {written(flat[n])}`" for n in changed) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
