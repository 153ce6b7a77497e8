"""Exceptions of the program. A `UserError` is a mistake that a person can correct."""


class UserError(Exception):
    """A mistake in a request, a file or the environment.

    The message is one printable line. It names the value, what is allowed and what to do. The
    command line prints it from rank 0 and exits with code 2. White space of other kinds in it
    becomes spaces and control characters escapes, because it may quote a file or another library,
    and whoever uses the package from Python prints it as it is.
    """

    def __init__(self, message: object = "", *more: object) -> None:
        text = str(message)
        if not text.isprintable():
            text = printable("".join(" " if c.isspace() else c for c in text))
        super().__init__(text, *more)


def printable(text: str) -> str:
    """Text without control, format and lone surrogate characters: they become escapes (\\x1b)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else escaped(c) for c in text)


def escaped(character: str) -> str:
    """A character as an escape of Python, in ASCII."""
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


class NoSpaceError(UserError):
    """The outputs of a request would likely not fit on the disk. free, needed: bytes, as text."""

    def __init__(self, message: str, free: str, needed: str) -> None:
        super().__init__(message)
        self.free, self.needed = free, needed


class SigningError(UserError):
    """Outputs cannot be signed. The message names the files of the certificate and of the key."""


class LackingCharacter(UserError):  # noqa: N818 (what a font lacks)
    """The font of a mark lacks a character of its text, both of which are kept."""

    def __init__(self, message: str, text: str, character: str) -> None:
        super().__init__(message)
        self.text, self.character = text, character


class CheckpointError(UserError):
    """A checkpoint directory or file does not fit the model; the message names weight and file."""


class PromptFault(UserError):  # noqa: N818 (the fault of a prompt does not end the run)
    """A mistake in one prompt of a list. The outputs of the other prompts can still be made.

    place: the index of the request in its batch.
    """

    def __init__(self, message: str, place: int = 0) -> None:
        super().__init__(message)
        self.place = place


class SharedPromptFault(PromptFault):
    """A `PromptFault` that is raised on every rank of the video."""


class SharedFault(UserError):  # noqa: N818 (all ranks raise it, and rank 0 prints it once)
    """A mistake that one rank found and that every rank raises, so that all end together."""


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM, raised in the main thread. number: the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Cancelled(Exception):  # noqa: N818 (nothing went wrong)
    """A callback asked to stop the generation. Every rank of the video raises it."""


class JobEnded(Exception):  # noqa: N818 (its cause is the error, which has been printed)
    """The run has ended on all ranks and the reason has been printed. Exit with `code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
