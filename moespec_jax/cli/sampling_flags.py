"""Flags of lengths, sampling and ends."""

import argparse

# Where one is not given, the checkpoint's generation_config.json decides.
SAMPLING_FLAGS = (
    ("--temperature", float, "T", "0 is greedy"),
    ("--top-k", int, "K", "sample from the k most probable tokens; 0: all"),
    ("--top-p", float, "P", "sample from the smallest set of most probable tokens that holds this probability; 1: all"),
    ("--min-p", float, "P", "sample from tokens of at least this share of the largest probability; 0: all"),
    ("--repetition-penalty", float, "X", "divide positive logits of tokens of prompt and text by this; 1: none"),
    ("--presence-penalty", float, "X", "subtract this from the logits of tokens of the text so far; 0: none"),
    ("--frequency-penalty", float, "X", "subtract this for each time that the text so far has the token; 0: none"),
)
SAMPLING_OPTIONS = tuple(flag[2:].replace("-", "_") for flag, *_ in SAMPLING_FLAGS)


def add_sampling_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the flags of lengths, sampling and ends; `max_new_tokens` is the default of that flag."""
    group = parser.add_argument_group(
        "sampling",
        "Settings that are not given are those of the checkpoint's\ngeneration_config.json; without it, greedy.",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="largest number of new tokens for each prompt (default: %(default)s)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of prompt and continuation together (default: the model's context)",
    )
    for flag, kind, letter, meaning in SAMPLING_FLAGS:
        group.add_argument(flag, type=kind, metavar=letter, help=meaning)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text, once it is generated; repeatable"
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of all random draws: the same seed gives the same text, with any draft and without (default: 0)",
    )
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's stop ids")
