"""The error for users: one sentence that says where, what, and what to do."""

from typing import ClassVar

from tuner.printable import printable


class UserError(Exception):
    """An error in the user's input. The CLI prints its message without a traceback, and exits with `exit_code`."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        """Printable: messages quote rows, and not only the CLI shows them."""
        return printable(super().__str__())


class MissingError(UserError):
    """A model, a dataset or a file that a config names is not here, and cannot be fetched."""


class DivergedError(UserError):
    """A run ended, but what it trained is no model: steps were skipped at its end, or numbers are not finite."""

    exit_code = 3


LOST = 75
"""Exit code of a rank that failed only because another rank did, which reports the error."""
