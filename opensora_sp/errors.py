"""The two kinds of failure: what a person can mend, and everything else."""


class UserError(Exception):
    """A mistake in a request, a file or the environment.

    Its message is one line that names the value, what is allowed and what to do.
    The command line prints it from rank 0 and ends with exit code 2.
    """


class CheckpointError(UserError):
    """A checkpoint directory or file that does not fit the model; names the weight and the file."""


class SharedFault(UserError):  # noqa: N818 (what all ranks were told of; rank 0 says it once)
    """A mistake found on one rank that every rank was told of, so that all end together."""
