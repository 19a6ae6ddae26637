"""Location of a model's files: a local directory, or a hub id that huggingface_hub downloads into its cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moespec_jax.errors import CheckpointError, first_line

# Code is never downloaded. Weights are downloaded as safetensors only, and without the copies that some repositories
# hold under other names.
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
    """Find the local directory of `model`; a hub id is downloaded unless it is in the cache.

    Args:
        model: directory, or hub id `owner/name`.
        revision: revision on the hub.
        offline: use the cache only.
        progress: show progress bars of downloads.
        torch_archives: also download `pytorch_model.bin`, in which many draft heads are published.
        patterns: files to download.

    Raises:
        CheckpointError: there is neither such a directory nor such a model, or it cannot be downloaded.
    """
    try:
        path = Path(model).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a forbidden parent, an unknown home
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"expected a model directory or hub id; cannot access {model}: {reason}") from None
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
    # `HTTPError` is the base class of the HTTP library in use.
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        reason = f"the download failed: {first_line(error)}"
    raise CheckpointError(f"expected a model directory or hub id; cannot get {at}: {reason}")


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Disable the hub library's progress bars unless `shown`: by default it prints them even to files."""
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
    return " and the hub gave no answer" + (f": {first_line(error.__cause__)}" if error.__cause__ else "")
