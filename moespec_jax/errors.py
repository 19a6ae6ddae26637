"""Errors that a caller can correct. Each message is one line: what was expected, what was found, and where."""

import os
import re
import reprlib
import traceback
from pathlib import Path


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


def wrong_type(name: str, expected: str, value: object) -> RequestError:
    """Make the error for an argument of another type: `expected seed as a whole number; got '5' (str)`."""
    return RequestError(f"expected {name} as {expected}; got {shown_value(value)}")


def shown_value(value: object) -> str:
    """Format a value and its type in one line of bounded length."""
    return one_line(f"{reprlib.repr(value)} ({type(value).__name__})")


def one_line(message: str) -> str:
    """Return a message as one line of bounded length: it may quote names and paths from foreign files."""
    if len(message) > 2000:
        message = f"{message[:1500]} ... {message[-400:]}"  # the place of the error is at the end
    return "".join(c if c.isprintable() else " " for c in message)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type where the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def platform_error(error: BaseException) -> str | None:
    """Describe in one line that JAX has not the platform that `JAX_PLATFORMS` names, or cannot use its devices; None
    for other errors."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and _raised_in_backends(error):  # a known platform without its plug-in
        text = "JAX has no plug-in for it"
    elif not re.match(r"(Unable to|Could not) initialize backend|Unknown backend|Backend '", text):
        return None
    requested = os.environ.get("JAX_PLATFORMS")
    expected = "a device of JAX" if not requested else f"a platform that JAX finds here (JAX_PLATFORMS={requested})"
    return one_line(f"expected {expected}; {text[:400]}")


def _raised_in_backends(error: BaseException) -> bool:
    """Test whether an exception comes from the function of JAX that initializes platforms."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and (Path(frames[-1].filename).name, frames[-1].name) == ("xla_bridge.py", "backends")
