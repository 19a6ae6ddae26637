"""lm-evaluation-harness with this package's models in it; all arguments are its own:

    python -m moespec_jax.evaluate.lm_eval run --model moespec --tasks gsm8k ...

Versions of it that look for plug-ins need no such help.
"""
# pyright: reportMissingImports=false

import sys

from moespec_jax.errors import CheckpointError, RequestError


def main() -> int:
    """The command line; returns the exit status: 2 for what the caller can fix."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import moespec_jax.evaluate.harness  # noqa: F401 (registers itself)
    except ImportError as error:
        print(f"error: expected lm-eval to be installed: pip install 'moespec_jax[eval]'; {error}", file=sys.stderr)
        return 2
    try:
        cli_evaluate()
    except (CheckpointError, RequestError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
