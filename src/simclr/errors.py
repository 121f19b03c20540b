"""Exceptions shown to the user."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence saying what was given, what is allowed, what to try.

    The command line prints the sentence and exits with code 2; from Python it is an ordinary ValueError.
    """


class Stopped(Exception):
    """A signal asked a training to stop, and it did, at a step from which it can go on.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, sentence: str, signal: int) -> None:
        super().__init__(sentence)
        self.signal = signal


class NotFinite(UserError):
    """Features or scores are NaN or infinite."""


class Diverged(UserError):
    """The loss or the weights are no longer finite; a search over learning rates goes on with the next."""


def shown(text: str, length: int = 80) -> str:
    """Text from a file, fit for a message: at most `length` characters, those that are not printable escaped."""
    cut = text if len(text) <= length else text[: length - 3] + "..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its final dot."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


class ReportedElsewhere(UserError):
    """Another of torchrun's processes failed first and reports it; this one ends without a word, with exit code 2."""
