"""Define the two expected kinds of failure: a user's mistake, and one bad input among many good ones."""

from collections.abc import Sequence
from dataclasses import dataclass


class UserError(Exception):
    """A mistake of the user: one line that names the thing and the remedy.

    Jobs print the message and the code in one line, without a stack trace, and exit with status 2.

    Args:
        message: the line; runs of white space become one space.
        code: a stable name of the kind of mistake, such as `preset-unknown`: first the thing, then the problem. The
            text of a message may change, its code may not, so tests and scripts match the code. `docs/errors.md` lists
            all codes.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(" ".join(message.split()))
        self._message = str(self.args[0])
        self.code = code
        self.add_note(f"[{code}]")  # printed below the message in a stack trace, from which the driver reads it

    def __str__(self) -> str:  # Ray Data adds advice on its retries to the arguments of what a task raises
        return self._message

    @property
    def line(self) -> str:
        """Message and code, as jobs print them: `unknown preset x; choose one of ... [preset-unknown]`."""
        return f"{self} [{self.code}]"

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:  # Ray pickles it: the code goes along
        return type(self), (str(self), self.code)


def counted(count: int | float, noun: str) -> str:
    """Return a number with its noun, for a message: `1 CPU`, `2 CPUs`, `0.5 CPUs`, `3 classes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count if isinstance(count, int) else format(count, 'g')} {noun}{ending}"


class BadInput(Exception):
    """One image or label that can't be used; the run continues without it.

    The message is the reason, such as ``truncated image``, short enough for a row of a table: stages count bad inputs
    by reason, name them in the report, and end the run if their share exceeds the recipe's.
    """


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One unused input: its name in the data set, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BadShare:
    """The maximum share of unusable inputs with which a run continues."""

    limit: int | float
    """0 to 1."""
    flag: str = "--dataset.max_bad_share"
    """The flag that sets the limit; empty if there is none."""

    def is_exceeded(self, bad: int, total: int) -> bool:
        """Return True if `bad` of `total` inputs are too many."""
        return bad > self.limit * total

    def check(self, bad: Sequence[LeftOut], total: int, what: str, *, at_least: bool = False) -> None:
        """Raise UserError if `bad` of `total` inputs are too many.

        Args:
            bad: inputs that can't be used; the error names the first three.
            total: number of all inputs, including these.
            what: plural of the input, such as `validation images`.
            at_least: more bad inputs may follow, because not all have been read yet.
        """
        if self.is_exceeded(len(bad), total):
            raise self.error(bad, total, what, at_least=at_least)

    def error(self, bad: Sequence[LeftOut], total: int, what: str, *, at_least: bool = False) -> UserError:
        """Return the error of :meth:`check`, for any share."""
        count = f"at least {len(bad)}" if at_least else str(len(bad))
        share = f"{len(bad) / max(1, total):.0%}"
        first = ", ".join(f"{x.name} ({x.reason})" for x in bad[:3])
        such = f", such as {first}" if bad else ""
        return UserError(
            f"{count} of {total} {what} ({share}) can't be used{such}: correct or remove them{self.or_raise}",
            code="images-bad",
        )

    @property
    def or_raise(self) -> str:
        """The second remedy of a message; empty without a flag."""
        return f", or raise {self.flag} from {self.limit:g}" if self.flag else ""


def in_words(error: BaseException) -> str:
    """Return an error as one line, in which a lack of memory comes first, whatever library reported it."""
    text = str(error) if isinstance(error, UserError) else " ".join(repr(error).split())[:300]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    signs = ("out of memory", "can't allocate memory", "running low on memory")
    if kinds & {"MemoryError", "OutOfMemoryError"} or any(sign in text for sign in signs):
        return text if text.startswith("out of memory") else f"out of memory: {text}"
    return text
