"""Errors that a caller can correct. Each message is one line: what was expected, what was found, and where."""


class RequestError(ValueError):
    """A request that the model cannot serve."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another kind than expected. Its message is one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class UnusableConversation(CheckpointError):
    """A conversation that a checkpoint's chat template refuses or renders in part, or that has no answer to learn."""


class UnsupportedConfig(ValueError):
    """A `config.json` that is invalid, or has a setting that would be computed wrongly. The message names the field."""


def one_line(message: str) -> str:
    """Return a message as one line of bounded length: it may quote names and paths from foreign files."""
    if len(message) > 2000:
        message = f"{message[:1500]} ... {message[-400:]}"  # the place of the error is at the end
    return "".join(c if c.isprintable() else " " for c in message)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type where the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)
