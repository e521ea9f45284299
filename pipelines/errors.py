"""What a user did wrong, a line for each mistake; everything else is a bug and keeps its traceback."""

import re


class UserError(Exception):
    """A mistake that the user can mend: the message names the field or object, its value, and what to do.

    A line a mistake: several at once (of a configuration) are several lines.  The command line prints the message
    alone and exits with code 2.  The message is the only argument, so
    the error pickles and crosses process borders unchanged.
    """

    exit_code = 2
    """The command's exit code: 2 for a mistake in the command or configuration, 1 for work that failed."""


def without_password(uri: str) -> str:
    """An address as it may be shown: user name and password are left out."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", uri)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error's message folded to one line of at most `limit` characters, for use inside a `UserError`."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(name: str) -> str:
    """A file's name as text of one line that every terminal and every UTF-8 file takes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
