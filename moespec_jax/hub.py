"""Where a model's files are: a directory as it is, or a hub id brought here by huggingface_hub with its own cache."""

from pathlib import Path

from moespec_jax.checkpoint import CheckpointError

# Code in a repository is never fetched, let alone run; weights only as safetensors.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "orbax/**"]


def locate(model: str, revision: str | None = None, offline: bool = False) -> Path:
    """The local directory of `model`: a path, or a hub id `owner/name` downloaded if it is not in the cache.

    Raises:
        CheckpointError: there is neither such a directory nor such a model, or it cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"expected a hub id with --revision {revision}; {model} is a directory")
        return path
    if path.exists():
        raise CheckpointError(f"expected a model directory or hub id; {model} is a file")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"expected a model directory or hub id; there is no directory {model}")
    return _download(model, revision, offline)


def _download(model: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{model}" + (f" at revision {revision}" if revision else "")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS, local_files_only=offline))
    except errors.HFValidationError:
        reason = "it is neither a directory here nor a valid hub id"
    except errors.GatedRepoError:
        reason = "the model is gated: accept its licence on the hub and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "the model has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "there is no such directory here and no such model on the hub, or it is private"
    except errors.LocalEntryNotFoundError:
        reason = "it is not in the local cache" + (" (--offline)" if offline else " and the hub cannot be reached")
    except (errors.HTTPError, OSError) as error:  # HTTPError is the base class of the HTTP library in use
        reason = f"the download failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    raise CheckpointError(f"expected a model directory or hub id; cannot get {at}: {reason}")
