"""Scripts around checkpoints, and what they share: one-line errors, and directories that appear whole or not at all."""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from moespec_jax.checkpoint.orbax_io import quiet_orbax
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.files import read_json, write_json, writing
from moespec_jax.parallel.processes import all_or_none, is_first_process

DTYPES = ("float32", "float16", "bfloat16")
MARK = ".incomplete-conversion"
# What belongs to a model besides its weights and its config.json.
_BESIDES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with what `main` returns; with status 2 and one line for anything the caller can fix, 130 for Ctrl-C."""
    quiet_orbax()  # which advises larger chunks than one expert, which is what we read at a time
    try:
        status = main()
        sys.stdout.flush()
    except (CheckpointError, RequestError) as error:
        status = _complain(2, str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        if not where:  # standard output, which Python must not complain about once more at exit
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _complain(2, f"expected to read and write files; {error.strerror or error}{where}")
    except KeyboardInterrupt:
        status = _complain(130, "expected to finish; interrupted, and nothing was kept")
    sys.exit(status)


@contextlib.contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `output` when the block ends well and vanishes when it does not.

    What a killed conversion to the same `output` left behind is removed first. Of several processes, all write into it.

    Raises:
        CheckpointError: `output` exists and is not an empty directory.
    """
    output = output.absolute()
    workplace = output.with_name(output.name + ".incomplete")
    with all_or_none():
        if is_first_process():
            _make_workplace(output, workplace)
    try:
        with all_or_none(), writing(output):
            yield workplace
        if is_first_process():
            os.replace(workplace, output)
            (output / MARK).unlink()
    except BaseException:
        if is_first_process():
            with contextlib.suppress(OSError):
                _remove(workplace)
        raise


def _make_workplace(output: Path, workplace: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(f"expected an output directory that is new or empty; {output} is neither")
    if workplace.exists():
        if not (workplace / MARK).exists() and any(workplace.iterdir()):
            raise CheckpointError(f"expected to write in {workplace}; it holds something else")
        _remove(workplace)
    workplace.mkdir(parents=True)
    (workplace / MARK).touch()


def _remove(workplace: Path) -> None:
    """The mark goes last: what a kill leaves of this is still known for ours."""
    for path in workplace.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(workplace)


def copy_besides(model: Path, output: Path, dtype: str | None) -> None:
    """Copy everything but the weights, config.json last: a directory without it is not a model. A config's own
    mention of its dtype follows `dtype`."""
    for pattern in _BESIDES:
        for file in sorted(model.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, output / file.name)
    fields = read_json(model / "config.json")
    if dtype is not None:
        fields |= {name: dtype for name in ("dtype", "torch_dtype") if name in fields}
    write_json(output / "config.json", fields)


def _complain(status: int, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
