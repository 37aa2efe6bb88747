"""Check data, weights, storage and machine, and show the work, size and cost of a training; nothing is computed.

`transfgu check folder --data FOLDER` takes the flags of `transfgu train`. `transfgu check RUN`, with only the folder of
a run, verifies all files in it, names damaged ones and the command that repairs them, and exits with status 1 if there
are any.
"""

from collections.abc import Sequence

from transfgu.cli import train
from transfgu.cli.command_line import Parser
from transfgu.errors import UserError, counted
from transfgu.presets import PRESETS
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser of `train`."""
    made = train.parser(words)
    made.description, made.prog, made.usage = __doc__, "transfgu check", "transfgu check [PRESET] [--FLAG VALUE ...]"
    return made


def main(words: Sequence[str]) -> None:
    """Verify a run's folder, or run `train --dry-run`."""
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
            f"{storage.shown(uri)} is neither the folder of a run (it has no recipe.yaml) nor one of the presets "
            f"{', '.join(PRESETS)}: give one of them",
            code="run-missing",
        )
    # Import torch only now, because it takes seconds.
    from transfgu.verification import verify

    found = verify(run)
    for damage in found.damage:
        print(f"{storage.shown(damage.file)}: {damage.reason}\n    {damage.remedy}")
    print(
        f"{counted(found.files, 'file')} read, {len(found.damage)} damaged; "
        f"complete stages: {', '.join(found.stages) or 'none'}: {storage.shown(run.uri)}"
    )
    if found.damage:
        raise SystemExit(1)
