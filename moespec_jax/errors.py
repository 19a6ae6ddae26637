"""Errors that a caller can fix: each message is one line that says what was expected, what came and where."""


class RequestError(ValueError):
    """A request that this model cannot serve: what was expected and what came."""


class CheckpointError(ValueError):
    """A checkpoint is not what it must be: what was expected, what came, and where; always one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """A message as one line of bounded length: names and paths in it come from somebody else's files."""
    if len(message) > 2000:
        message = f"{message[:1500]} ... {message[-400:]}"  # where it is comes last
    return "".join(c if c.isprintable() else " " for c in message)


class UnsupportedConfig(ValueError):
    """A `config.json` says something this library would compute wrongly."""
