"""Runs the program on standard input under limits, and says a word if it gets to its end:

    python -I limited.py CPU_SECONDS BYTES WORD

A process of its own and not a hook before it: JAX's threads do not survive a fork that runs Python.
"""

import os
import resource
import sys


def main() -> None:
    """Limit this process, then become the program."""
    seconds, size, word = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    program = sys.stdin.buffer.read().decode()
    # What the program prints is nobody's business.
    said, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    sys.argv[:] = ["program"]
    limits = {"CPU": seconds, "AS": size, "FSIZE": 1 << 20, "CORE": 0, "NPROC": 0}
    for name, most in limits.items():
        _limit(getattr(resource, f"RLIMIT_{name}"), most)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(said, word.encode())


def _limit(kind: int, most: int) -> None:
    """Not every system grants every limit."""
    try:
        resource.setrlimit(kind, (most, most))
    except (ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
