"""Check data, weights, storage and machine, and show what a training would do, write and cost; nothing is computed.

`transfgu check folder --data FOLDER` takes the flags of `transfgu train`.
"""

import sys
from collections.abc import Sequence

from transfgu.cli import train
from transfgu.cli.command_line import Parser


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser of `train`."""
    made = train.parser(words)
    made.description, made.prog, made.usage = __doc__, "transfgu check", "transfgu check [PRESET] [--FLAG VALUE ...]"
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Run `train --dry-run`."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help", "--help-all"} & set(words):
        parser(words).parse(words)
    train.main([*words, "--dry-run"])
