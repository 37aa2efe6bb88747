"""Two ways to fail that are nobody's bug: a user's mistake, and one bad input among many good ones."""


class UserError(Exception):
    """A mistake of the user's: one line that names the thing and the remedy.

    Jobs print the message alone, without a stack trace, and exit with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class BadInput(Exception):
    """One image or label that can't be used; the run goes on without it.

    The message is the reason, such as ``truncated image``, short enough to be a row of a table: stages count
    bad inputs by reason, name them in the report, and end the run once their share passes the recipe's.
    """
