"""List every kind of user's mistake in the documents, as the code raises them.

The list comes from the package's own source, so it has exactly the codes that can be raised.
`python -m transfgu.cli.error_page docs/errors.md` writes the page (`make docs`).
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("transfgu", "jobs", "cluster")
_RANGE = "field-range"  # the default of transfgu.fields.check

_HEAD = """# Error codes

A mistake in a command, a recipe or a data set ends a job with exit status 2 and one line: the problem, the remedy, and
a code in brackets, such as `[run-locked]`. In Python the same mistake is a `transfgu.errors.UserError` with the code in
`code`. The text of a message may change between versions; codes do not change.

Words in *italics* are placeholders for names and values. The last column shows the modules that raise the error.

*This page is written by `make docs` from the code; do not edit it.*

| code | messages | modules |
| --- | --- | --- |
"""


@dataclass(frozen=True, order=True)
class Mistake:
    """A place in the code that raises a user's mistake."""

    code: str
    """Empty if the place has none, which is an error; the page leaves it out."""
    message: str
    """In Markdown, with names in italics instead of values."""
    module: str
    line: int


def mistakes() -> list[Mistake]:
    """Return all places that raise a user's mistake with its own text, by code; errors passed on are left out."""
    files = [path for folder in _FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return sorted(mistake for path in files for mistake in _mistakes_in(path))


def page() -> str:
    """Return the page as Markdown."""
    rows = []
    for code, found in groupby(mistakes(), key=lambda mistake: mistake.code):
        places = list(found)
        messages = dict.fromkeys(place.message for place in places)
        modules = dict.fromkeys(f"`{place.module}`" for place in places)
        rows.append(f"| `{code}` | {'<br>'.join(messages)} | {', '.join(modules)} |\n")
    return _HEAD + "".join(rows)


def _mistakes_in(path: Path) -> Iterator[Mistake]:
    tree = ast.parse(path.read_text())
    module = str(path.relative_to(ROOT))
    checks = any(isinstance(n, ast.ImportFrom) and n.module == "transfgu.fields" for n in tree.body)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id == "UserError":
            arguments, default = node.args, ""
        elif node.func.id == "check" and checks:
            arguments, default = node.args[1:], _RANGE
        else:
            continue
        given = [k.value for k in node.keywords if k.arg == "code"] + arguments[1:2]
        if given and not isinstance(given[0], ast.Constant):
            continue  # passed on from another error, or from the caller of `check`
        code = str(given[0].value) if given and isinstance(given[0], ast.Constant) else default
        text = _words(arguments[0])
        yield Mistake(code, " ".join(text.split()).replace("|", "\\|"), module, node.lineno)


def _words(message: ast.expr) -> str:
    """Return the message with names instead of values."""
    if isinstance(message, ast.Constant):
        return str(message.value).replace("*", "\\*")
    if isinstance(message, ast.JoinedStr):
        return "".join(map(_words, message.values))
    if isinstance(message, ast.FormattedValue):
        match message.value:
            case ast.Call(func=ast.Name(id="counted"), args=[count, ast.Constant(value=str(noun))]):
                return f"*{_name(count)}* {noun}{'es' if noun.endswith('s') else 's'}"
        return f"*{_name(message.value)}*"
    return f"*{_name(message)}*"


def _name(value: ast.expr) -> str:
    """Return the name of a value in a message: that of a variable, a field, or a call's argument."""
    match value:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ").lower()
        case ast.Call(func=ast.Name(id="getattr")):
            return "value"
        case ast.Call(func=ast.Name(id="map"), args=[_, values, *_]):
            return _name(values)
        case ast.Call(args=[first, *_]):
            return _name(first)
        case ast.Call(func=ast.Attribute(value=of)):
            return _name(of)
        case ast.Subscript(value=of, slice=ast.Constant(value=str(key))):
            return key
        case ast.Subscript(value=of) | ast.GeneratorExp(elt=of) | ast.ListComp(elt=of) | ast.Starred(value=of):
            return _name(of)
        case ast.BoolOp(values=[first, *_]):
            return _name(first)
        case ast.IfExp(body=ast.Constant(), orelse=ast.Constant()) | ast.Constant():
            return "..."
        case ast.IfExp(body=body):
            return _name(body)
        case ast.BinOp(left=left, right=right):
            return _name(right if isinstance(left, ast.Constant) else left)
        case _:
            return "..."


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
