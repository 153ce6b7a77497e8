"""The two kinds of failure: what a person can mend, and everything else."""


class UserError(Exception):
    """A mistake in a request, a file or the environment.

    Its message is one line that names the value, what is allowed and what to do.
    The command line prints it from rank 0 and ends with exit code 2.
    """


class CheckpointError(UserError):
    """A checkpoint directory or file that does not fit the model; names the weight and the file."""


class PromptFault(UserError):  # noqa: N818 (it is the prompt's, not the run's)
    """A mistake of one prompt, found while the run goes on: the others can still be made.

    place: which request of its batch it is, from 0.
    """

    def __init__(self, message: str, place: int = 0) -> None:
        super().__init__(message)
        self.place = place


class SharedPromptFault(PromptFault):
    """A mistake of one prompt that every rank of its video was told of."""


class SharedFault(UserError):  # noqa: N818 (what all ranks were told of; rank 0 says it once)
    """A mistake found on one rank that every rank was told of, so that all end together."""


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM, raised in the main thread; number is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Cancelled(Exception):  # noqa: N818 (nothing went wrong)
    """A callback asked for the generation to end; every rank of the video raises it."""


class JobEnded(Exception):  # noqa: N818 (the error is its cause, and has been said)
    """The run has ended on all ranks and the reason has been printed; only `code` is left to do."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
