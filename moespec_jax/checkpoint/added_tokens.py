"""Tokens that a checkpoint adds to its `tokenizer.json` in other files, as transformers does when it loads them:
`added_tokens_decoder` of `tokenizer_config.json`, or else the older `added_tokens.json`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from moespec_jax.checkpoint.config_fields import section, shown
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.files import read_json

_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_CONFIG, _LEGACY, _NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"


def add_stated_tokens(tokenizer: Tokenizer, directory: Path) -> None:
    """Add the tokens of other files that the tokenizer has not, or has as ordinary tokens only.

    Raises:
        CheckpointError: a file is damaged, or the tokenizer gives a token another id than its file.
    """
    file, stated = _stated(directory)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in sorted(stated.items()):
        if token.content in known:
            continue
        tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise CheckpointError(
                f"expected the id {number} for {shown(token.content)}, as in {directory / file}; added to"
                f" tokenizer.json it has {found}"
            )


def _stated(directory: Path) -> tuple[str, dict[int, AddedToken]]:
    """Read the file that counts, with its tokens by id."""
    fields, special = _read(directory / _CONFIG), set(_named(_read(directory / _NAMES)))
    try:
        if "added_tokens_decoder" in fields:
            given = section(fields, "added_tokens_decoder")
            return _CONFIG, {int(i): _token(fields) for i, fields in given.items()}
        special |= set(_named(fields))
        given = _read(directory / _LEGACY)
        return _LEGACY, {
            int(i): AddedToken(text, normalized=text not in special, special=text in special)
            for text, i in given.items()
        }
    except (UnsupportedConfig, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"expected added tokens with their ids in {directory}; {error}") from None


def _token(fields: Mapping[str, Any]) -> AddedToken:
    return AddedToken(fields["content"], **{name: fields[name] for name in _FLAGS if name in fields})


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _named(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the special tokens that fields such as `eos_token` and `additional_special_tokens` name."""
    for name, value in fields.items():
        if name.endswith(("_token", "special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str):
                    yield text
