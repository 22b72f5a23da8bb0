"""The one exception a user's mistake raises: what is wrong, where, and what to do, in one line.

The command line prints it and exits with code 2; a library user can catch it as a ``ValueError``.
"""


class InputError(ValueError):
    """Bad input (a file, an option, a setting). The message is one line and names a remedy."""


def one_line(error: BaseException) -> str:
    """The error's message folded to a single line, headed by its class where it says nothing itself."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
