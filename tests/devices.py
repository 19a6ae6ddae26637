"""Starting programs on many devices, and in many processes, which a test's own process cannot become any more."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
# Tests compile hundreds of programs that run for milliseconds: LLVM emits them as they come, in one piece. The emitters
# of jaxlib 0.10 take a quarter longer to compile than those before them; later versions have no others.
FAST_COMPILE_FLAGS = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
    ]
)


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many virtual CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE_FLAGS}"
    cache = TESTS.parent / ".pytest_cache" / f"xla-{devices}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths} | kept


def run_processes(
    command: Sequence[str], devices: int, processes: int = 1, timeout: float = 900
) -> list[subprocess.CompletedProcess[str]]:
    """The same command in so many processes that find each other, with `devices` virtual devices each."""
    together = ["--processes", str(processes), "--coordinator", f"localhost:{_free_port()}", "--process-id"]
    started = [
        subprocess.Popen(
            [sys.executable, *command, *([*together, str(number)] if processes > 1 else [])],
            env=environment(devices), cwd=TESTS.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(processes)
    ]  # fmt: skip
    done = []
    try:
        for process in started:
            out, err = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return done


def results(command: Sequence[str], devices: int, processes: int = 1) -> list[Any]:
    """What each process printed last, as JSON."""
    done = run_processes(command, devices, processes)
    for process in done:
        assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(process.stdout.splitlines()[-1]) for process in done]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]
