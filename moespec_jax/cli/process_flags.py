"""Connection of the processes of one command, on one host or several, by flags or environment variables."""

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
    """Add the flags by which a process finds the others."""
    variables = ", ".join(_ENVIRONMENT.values())
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help=f"address at which the first of several processes listens (environment: {variables})",
    )
    group.add_argument("--processes", type=int, metavar="N", help="number of processes that run this command")
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the other processes by Cloud TPU, Slurm or MPI, instead of the three flags",
    )


def join_processes(arguments: argparse.Namespace) -> None:
    """Connect with the other processes of flags or environment, if there are any, before JAX lists its devices.

    Raises:
        RequestError: the connection is described in part, or fails.
    """
    values = {name: _value(arguments, name) for name in _ENVIRONMENT}
    present = {name: value for name, value in values.items() if value is not None}
    if not present and not arguments.distributed:
        return
    if present and len(present) < len(values):
        missing = [f"--{name.replace('_', '-')}" for name in values if name not in present]
        raise RequestError(
            f"expected --coordinator, --processes and --process-id together; missing: {', '.join(missing)}"
        )
    numbers = _numbers(present) if present else None
    stdout = _redirect_libraries()
    try:
        if numbers is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(present["coordinator"], *numbers)
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"expected other processes to run with (--coordinator HOST:PORT); {error}") from None
    sys.stdout = stdout if is_first_process() else Path(os.devnull).open("w")


def _numbers(values: dict[str, str]) -> tuple[int, int]:
    """Parse the number of processes and the index of this one.

    Raises:
        RequestError: they are not such numbers, or the coordinator is not an address.
    """
    count, number = values["processes"], values["process_id"]
    fits = count.isdecimal() and number.isdecimal() and int(number) < int(count)
    if not fits or not values["coordinator"].rpartition(":")[2].isdecimal() or ":" not in values["coordinator"]:
        raise RequestError(
            "expected --coordinator HOST:PORT and a --process-id from 0 to --processes - 1; got process"
            f" {number} of {count} at {values['coordinator']}"
        )
    return int(count), int(number)


def _redirect_libraries() -> TextIO:
    """Send file descriptor 1 to standard error, and return a stream to the original standard output.

    Libraries below Python print to descriptor 1 when processes connect, which would mix with the output.
    """
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stdout


def _value(arguments: argparse.Namespace, name: str) -> str | None:
    value = getattr(arguments, name)
    return os.environ.get(_ENVIRONMENT[name]) if value is None else str(value)
