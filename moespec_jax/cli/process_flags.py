"""How the processes of one command find each other, on one host or many: by flags, or by the environment."""

import argparse
import os
import sys
from pathlib import Path
from typing import TextIO

import jax

from moespec_jax.errors import RequestError
from moespec_jax.parallel.processes import is_first_process

_ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def add_process_flags(group: argparse._ArgumentGroup) -> None:
    """How a command line's process finds the others."""
    variables = ", ".join(_ENVIRONMENT.values())
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help=f"where the first of several processes listens (also: {variables})"
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many processes run this command")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--distributed", action="store_true", help="find the other processes as Cloud TPU, Slurm or MPI tell of them"
    )


def join_processes(arguments: argparse.Namespace) -> None:
    """Connect with the processes that flags or environment name, if they do, before anything asks JAX for devices.

    Raises:
        RequestError: they are named in part, or cannot be reached.
    """
    named = {name: _asked(arguments, name) for name in _ENVIRONMENT}
    given = {name: value for name, value in named.items() if value is not None}
    if not given and not arguments.distributed:
        return
    if given and len(given) < len(named):
        missing = [f"--{name.replace('_', '-')}" for name in named if name not in given]
        raise RequestError(f"expected --coordinator, --processes and --process-id together; {', '.join(missing)} lack")
    numbers = _numbers(given) if given else None
    own = _keep_standard_output()
    try:
        if numbers is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(given["coordinator"], *numbers)
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"expected other processes to run with (--coordinator HOST:PORT); {error}") from None
    sys.stdout = own if is_first_process() else Path(os.devnull).open("w")


def _numbers(given: dict[str, str]) -> tuple[int, int]:
    """How many processes there are, and which this is.

    Raises:
        RequestError: these are no such numbers, or the coordinator is no address.
    """
    count, number = given["processes"], given["process_id"]
    fits = count.isdecimal() and number.isdecimal() and int(number) < int(count)
    if not fits or not given["coordinator"].rpartition(":")[2].isdecimal() or ":" not in given["coordinator"]:
        raise RequestError(
            "expected --coordinator HOST:PORT and a --process-id from 0 to --processes - 1; got process"
            f" {number} of {count} at {given['coordinator']}"
        )
    return int(count), int(number)


def _keep_standard_output() -> TextIO:
    """What we print goes to our own; libraries below Python, which tell on it that processes are connected, are sent to
    standard error."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _asked(arguments: argparse.Namespace, name: str) -> str | None:
    value = getattr(arguments, name)
    return os.environ.get(_ENVIRONMENT[name]) if value is None else str(value)
