"""Token streams of the embedded pair's text, kept in the directory of a training run."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from moespec_jax.measure import corpus


def prepare_text(directory: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Train the tokenizer and tokenize both texts, or read them from `directory`; returns the training stream and the
    held-out stream."""
    if not (directory / "streams.npz").exists():
        documents, held_out = corpus.training_documents(), corpus.held_out_documents()
        tokenizer = corpus.train_tokenizer(list(dict.fromkeys(documents)), vocab_size)
        tokenizer.save(str(directory / "tokenizer.json"))
        np.random.default_rng(0).shuffle(documents)
        sizes = {
            "train_bytes": sum(len(d.encode()) for d in documents),
            "held_out_bytes": sum(len(d.encode()) for d in held_out),
        }
        (directory / "corpus.json").write_text(json.dumps(corpus.corpus_versions() | sizes))
        np.savez(
            directory / "streams.npz",
            train=corpus.encode_documents(tokenizer, documents).astype(np.uint16),
            held_out=corpus.encode_documents(tokenizer, held_out).astype(np.uint16),
        )
    with np.load(directory / "streams.npz") as streams:
        return streams["train"], streams["held_out"]


def bytes_per_token(directory: Path, held_out: np.ndarray) -> float:
    """Compute the mean number of bytes in a token of the held-out text."""
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).decode(held_out.tolist(), skip_special_tokens=True)
    return len(text.encode()) / len(held_out)
