"""The error for users: one sentence that says where, what, and what to do."""

from tuner.printable import printable


class UserError(Exception):
    """An error in the user's input. The CLI prints its message without a traceback, and exits with 2."""

    def __str__(self) -> str:
        """Printable: messages quote rows, and not only the CLI shows them."""
        return printable(super().__str__())


LOST = 75
"""Exit code of a rank that failed only because another rank did, which reports the error."""
