"""Check data, weights, storage and machine, and show what a training would do, write and cost; nothing is computed.

`transfgu check folder --data FOLDER` takes the flags of `transfgu train`. `transfgu check RUN`, with a run's folder
alone, verifies all files in it, says which are damaged and which command mends them, and exits with status 1 if any is.
"""

import sys
from collections.abc import Sequence

from transfgu.cli import train
from transfgu.cli.command_line import Parser
from transfgu.errors import UserError
from transfgu.presets import PRESETS
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser of `train`."""
    made = train.parser(words)
    made.description, made.prog, made.usage = __doc__, "transfgu check", "transfgu check [PRESET] [--FLAG VALUE ...]"
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Verify a run's folder, or run `train --dry-run`."""
    words = sys.argv[1:] if words is None else words
    if len(words) == 1 and words[0] not in PRESETS and not words[0].startswith("-"):
        _verify(words[0])
        return
    if {"-h", "--help", "--help-all"} & set(words):
        parser(words).parse(words)
    train.main([*words, "--dry-run"])


def _verify(uri: str) -> None:
    run = Run(storage.absolute(uri))
    if not storage.exists(run.file("recipe.yaml")):
        raise UserError(
            f"{storage.shown(uri)} is neither a run's folder, as it holds no recipe.yaml, nor one of the presets "
            f"{', '.join(PRESETS)}: name one of them",
            code="run-missing",
        )
    # Only now torch, which takes seconds to import.
    from transfgu.verification import verify

    found = verify(run)
    for damage in found.damage:
        print(f"{storage.shown(damage.file)}: {damage.reason}\n    {damage.remedy}")
    print(
        f"{found.files} files read, {len(found.damage)} damaged; "
        f"complete stages: {', '.join(found.stages) or 'none'}: {storage.shown(run.uri)}"
    )
    if found.damage:
        raise SystemExit(1)
