"""Text of the embedded pair: Python source that is part of every installation, and a byte-level BPE tokenizer.

The training text is the standard library of the running interpreter, with its tests and reference topics, and the
sources of a few permissively licensed dependencies. Some modules of the standard library, and all files named after
them, are held out.
"""

import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = (
    "argparse", "configparser", "difflib", "fractions", "heapq", "ipaddress", "json",
    "mailbox", "pprint", "sched", "statistics", "textwrap", "zipfile",
)  # fmt: skip
DEPENDENCIES = ("jax", "numpy", "flax", "optax")
# Tables of code points and generated parsers are unlike code that people write.
_SKIPPED_PARTS = {"site-packages", "encodings", "__pycache__", "lib2to3", "data", "bad_coding"}
_LARGEST_FILE = 400_000


def held_out_documents() -> list[str]:
    """Read the held-out modules, one string for each file."""
    return [text for path, text in _stdlib_files() if _is_held_out(path)]


def training_documents() -> list[str]:
    """Read the training text: the standard library without held-out modules, twice, and each dependency once."""
    stdlib = [text for path, text in _stdlib_files() if not _mentions_held_out(path)]
    return stdlib * 2 + [text for name in DEPENDENCIES for text in _package_files(name)]


def corpus_versions() -> dict[str, str]:
    """Versions of Python and of the dependencies in the training text."""
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in DEPENDENCIES}}


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which encodes any bytes without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Concatenate the token ids of all documents, with the end-of-text token before each."""
    start = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch(documents):
        stream.append(np.array([start, *encoding.ids], np.int32))
    return np.concatenate(stream)


def _stdlib_files() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    yield from _python_files(root)


def _package_files(name: str) -> Iterator[str]:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is not installed"
    yield from (text for _, text in _python_files(Path(spec.submodule_search_locations[0])))


def _python_files(root: Path) -> Iterator[tuple[Path, str]]:
    """List the UTF-8 Python files under `root` in a fixed order, as relative path and text."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS & set(relative.parts) or path.stat().st_size > _LARGEST_FILE and path.name != "topics.py":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative, text


def _is_held_out(path: Path) -> bool:
    return path.parts[0].removesuffix(".py") in HELD_OUT


def _mentions_held_out(path: Path) -> bool:
    """Test whether a path belongs to a held-out module, or to a file named after one, such as its tests."""
    names = {part.removesuffix(".py").removeprefix("test_") for part in path.parts}
    return bool(names & set(HELD_OUT))
