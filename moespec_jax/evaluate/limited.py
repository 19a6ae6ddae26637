"""Run the program on standard input under resource limits, and print a word if it runs to its end:

    python -I limited.py CPU_SECONDS BYTES WORD

This is a separate interpreter instead of a function between fork and exec, since a fork of a process with JAX's threads
must not run Python.
"""

import os
import resource
import sys


def main() -> None:
    """Limit this process, then execute the program in it."""
    seconds, size, word = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    program = sys.stdin.buffer.read().decode()
    # The output of the program is discarded; only the word reaches the original standard output.
    stdout, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.argv[:] = ["program"]
    limits = {"CPU": seconds, "AS": size, "FSIZE": 1 << 20, "CORE": 0, "NPROC": 0}
    for name, limit in limits.items():
        _set_limit(getattr(resource, f"RLIMIT_{name}"), limit)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(stdout, word.encode())


def _set_limit(kind: int, limit: int) -> None:
    """Set a limit, if the system supports it."""
    try:
        resource.setrlimit(kind, (limit, limit))
    except (ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
