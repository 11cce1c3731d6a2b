"""The one error a user is meant to read: where, what, and what to do, in a sentence."""


class UserError(Exception):
    """Bad input of the user's: the CLI prints its one sentence, without a traceback, and exits with 2."""


LOST = 75
"""Exit code of a process whose others are gone: why, they have said."""
