"""Where a model's files are: a directory as it is, or a hub id brought here by huggingface_hub with its own cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moespec_jax.errors import CheckpointError

# Code in a repository is never fetched, let alone run; weights only as safetensors, and only once: some repositories
# hold them again under other names.
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "orbax/**")
_IGNORED = ["*.py", "consolidated*", "*/*.safetensors"]


def locate(
    model: str,
    revision: str | None = None,
    offline: bool = False,
    progress: bool = False,
    torch_archives: bool = False,
    patterns: tuple[str, ...] = _PATTERNS,
) -> Path:
    """The local directory of `model`: a path, or a hub id `owner/name` downloaded if it is not in the cache. With
    `torch_archives` weights may come as `*.bin` too, as many draft heads do. `patterns` name the files to fetch.

    Raises:
        CheckpointError: there is neither such a directory nor such a model, or it cannot be fetched.
    """
    try:
        path = Path(model).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a forbidden parent, an unknown home
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"expected a model directory or hub id; cannot look at {model}: {reason}") from None
    if model and is_directory:
        if revision is not None:
            raise CheckpointError(f"expected a hub id with --revision {revision}; {model} is a directory")
        return path
    if model and exists:
        raise CheckpointError(f"expected a model directory or hub id; {model} is a file")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"expected a model directory or hub id; there is no directory {model}")
    with _progress_bars(progress):
        return _download(model, revision, offline, [*patterns, *(["pytorch_model.bin"] if torch_archives else [])])


def _download(model: str, revision: str | None, offline: bool, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED,
                local_files_only=offline,
            )
        )
    except errors.HFValidationError:
        reason = "it is neither a directory here nor a valid hub id"
    except errors.GatedRepoError:
        reason = "the model is gated: accept its licence on the hub and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "the model has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "there is no such directory here and no such model on the hub, or it is private"
    except errors.LocalEntryNotFoundError as error:
        reason = f"it is not (or not whole) in the local cache{_why_not_online(error, offline)}"
    # The base class of the HTTP library in use, whichever that is.
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        reason = f"the download failed: {_first_line(error)}"
    raise CheckpointError(f"expected a model directory or hub id; cannot get {at}: {reason}")


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """The hub library's bars, which it shows unless told not to, even where standard error is a file."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _why_not_online(error: Exception, offline: bool) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if offline:
        return " (--offline)"
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return " (HF_HUB_OFFLINE is set)"
    return " and the hub gave no answer" + (f": {_first_line(error.__cause__)}" if error.__cause__ else "")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
