"""Model arguments of lm-evaluation-harness (`--model_args`): the flags of our commands, without dashes."""

import argparse
from typing import Any

from moespec_jax.cli.arguments import add_mesh_flag, add_model_flags, add_profile_flag, add_tree_flags
from moespec_jax.cli.budget_flags import add_budget_flags
from moespec_jax.cli.command import Parser
from moespec_jax.errors import RequestError

# Arguments that lm-eval passes to every model, and that have no effect here.
_IGNORED = ("device", "max_batch_size")
# Arguments with a value "none", which lm-eval parses as None.
_NONE = ("draft_model", "expert_budget", "budget_anchor", "compilation_cache")
AUTO_BATCH = 16


def read_model_args(given: dict[str, Any]) -> argparse.Namespace:
    """Parse model arguments into the namespace of a command's flags.

    `pretrained` is `model`; `tree` is size/depth/top-k, or none for plain decoding. In `expert_budget` and `mesh`,
    slashes stand for commas, since those separate model arguments.

    Raises:
        RequestError: an argument is unknown or has an invalid value.
    """
    parser = Parser(prog="model_args", allow_abbrev=False, add_help=False)
    for add in (add_model_flags, add_mesh_flag, add_tree_flags, add_budget_flags, add_profile_flag):
        add(parser.add_argument_group())
    parser.add_argument("--batch-size", type=_batch_size, default=1)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--max-gen-toks", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-thinking", action="store_true")
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args(_flags(given))
    if arguments.batch_size < 1:
        raise RequestError(f"expected a batch_size of at least 1; got {arguments.batch_size}")
    return arguments


def _flags(given: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in given.items():
        value = "none" if value is None and name in _NONE else value
        flag = "--" + {"pretrained": "model"}.get(name, name).replace("_", "-")
        if name == "tree":
            flags += _tree_flags(value)
        elif name in ("expert_budget", "mesh") and value is not None:
            flags.append(f"{flag}={value}".replace("/", ","))
        elif value is True:
            flags.append(flag)
        elif name not in _IGNORED and value is not None and value is not False:
            flags.append(f"{flag}={value}")
    return flags


def _tree_flags(value: Any) -> list[str]:
    if value in (None, "none"):
        return ["--plain"]
    numbers = str(value).split("/")
    names = ("--tree-size", "--tree-depth", "--tree-top-k")
    return [f"{name}={number}" for name, number in zip(names, numbers, strict=False)] + numbers[3:]


def _batch_size(text: str) -> int:
    return AUTO_BATCH if text.startswith("auto") else int(text)
