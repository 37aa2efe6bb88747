"""Print the JSON Schema of a recipe, with which editors complete and check YAML.

Run `transfgu schema > recipe.schema.json` and add this first line to a recipe: `# yaml-language-server: $schema=FILE`.
"""

import json
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from transfgu import formats
from transfgu.cli.command_line import GROUPS, Parser
from transfgu.fields import FieldInfo
from transfgu.presets import PRESETS
from transfgu.recipe import FIELDS, SHORT_NAMES

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `recipe.yaml`.

    It describes files that a run writes and that `--recipe` reads: components as mappings, or fields by their dotted or
    short names. Only the recipe itself checks whether values fit together.
    """
    fields = {name: _field(info) for name, info in FIELDS.items()}
    fields["preset"] = {"description": FIELDS["preset"].doc, "enum": list(PRESETS)}
    components = {
        component: {
            "description": title,
            "type": "object",
            "properties": {n.rpartition(".")[2]: s for n, s in fields.items() if n.startswith(f"{component}.")},
            "additionalProperties": False,
        }
        for component, title in GROUPS.items()
        if component
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of a TransFGU run",
        "type": "object",
        "properties": {
            formats.KEY: {"description": "file format", "type": "integer", "minimum": 1, "maximum": formats.FORMAT},
            "given": {"description": "fields that the user gave", "type": "array", "items": {"type": "string"}},
            **fields,
            **{short: fields[name] for short, name in SHORT_NAMES.items()},
            **components,
        },
        "additionalProperties": False,
    }


def _field(info: FieldInfo) -> dict[str, Any]:
    origin, args = get_origin(info.kind), get_args(info.kind)
    described: dict[str, Any] = {"description": f"{info.doc}{f' [{info.unit}]' if info.unit else ''}"}
    if info.kind in _TYPES:
        return {**described, "type": _TYPES[info.kind]}
    if origin is tuple:
        sides = {} if args[-1] is Ellipsis else {"minItems": len(args), "maxItems": len(args)}
        return {**described, "type": "array", "items": {"type": _TYPES[args[0]]}, **sides}
    return {**described, "enum": list(args)}


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    return Parser(__doc__ or "", "schema")


def main(words: Sequence[str]) -> None:
    """Print the schema."""
    parser(words).parse(words)
    print(json.dumps(schema(), indent=1))
