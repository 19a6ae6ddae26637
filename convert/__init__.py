"""Scripts for checkpoints, and their shared parts: flags, one-line errors, and atomic output directories."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from moespec_jax import status_line
from moespec_jax.checkpoint.dtypes import FLOAT_DTYPES
from moespec_jax.checkpoint.orbax_io import quiet_orbax
from moespec_jax.checkpoint.quantized.detect import QUANTIZATION_FIELDS
from moespec_jax.checkpoint.wrappers import text_fields
from moespec_jax.cli import command
from moespec_jax.errors import CheckpointError, RequestError, platform_error
from moespec_jax.files import read_json, write_json, writing
from moespec_jax.parallel.processes import all_or_none, is_first_process

ALLOW_NON_FINITE = "--allow-non-finite"
# Name of a file that identifies the directory of an unfinished conversion.
MARK = ".incomplete-conversion"
# Files of a model other than its weights and its config.json.
_METADATA = (
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


class Parser(command.Parser):
    """Argument parser that exits on wrong usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def make_parser(script: str, doc: str | None) -> Parser:
    """Make the parser of `python -m convert.SCRIPT`, described by the first line of its module's docstring."""
    return Parser(prog=f"python -m convert.{script}", description=(doc or "").partition("\n")[0])


def add_output_flags(parser: Parser) -> None:
    """Add the flags of scripts that write a checkpoint."""
    parser.add_argument("--output", required=True, type=Path, help="new or empty directory")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="dtype of all parameters (default: unchanged)")
    parser.add_argument(ALLOW_NON_FINITE, action="store_true", help="accept weights that are NaN or infinite")


def run(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with the status that it returns; with status 2 and one line for errors that the caller can
    correct, 130 for Ctrl-C."""
    status_line.show("")
    quiet_orbax()  # orbax advises larger chunks than one expert, the unit that is read
    try:
        status = main()
        sys.stdout.flush()
    except (CheckpointError, RequestError) as error:
        status = _report(2, str(error))
    except (RuntimeError, AssertionError) as error:
        if (message := platform_error(error)) is None:
            raise
        status = _report(2, message)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        if not where:  # standard output, which Python would flush at exit, with a second error
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _report(2, f"expected to read and write files; {error.strerror or error}{where}")
    except KeyboardInterrupt:
        status = _report(130, "expected to finish; interrupted, and nothing was kept")
    sys.exit(status)


@contextlib.contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Yield a temporary directory, which is renamed to `output` when the block succeeds and removed when it fails.

    The remains of a killed conversion to the same `output` are removed first. Several processes share the directory.

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
    """Remove a temporary directory, its mark last, so that the remains of a killed removal are still recognized."""
    for path in workplace.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(workplace)


def copy_metadata(model: Path, output: Path, dtype: str | None) -> None:
    """Copy all files but the weights, config.json last: a directory without it is incomplete. With a `dtype`, the dtype
    fields of config.json are updated; a description of quantized weights is left out, as they are dequantized. Of a
    model of text and images, config.json is that of the text model."""
    for pattern in _METADATA:
        for file in sorted(model.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, output / file.name)
    fields = text_fields(read_json(model / "config.json"))
    fields = {name: value for name, value in fields.items() if name not in QUANTIZATION_FIELDS}
    if dtype is not None:
        fields |= {name: dtype for name in ("dtype", "torch_dtype") if name in fields}
    write_json(output / "config.json", fields)


def _report(status: int, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
