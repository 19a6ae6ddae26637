"""Run lm-evaluation-harness with the model `moespec` registered; all arguments are those of `lm_eval`:

    python -m moespec_jax.evaluate.lm_eval run --model moespec --tasks gsm8k ...

Versions of lm-eval that load plug-ins do not need this module.
"""
# pyright: reportMissingImports=false

import sys

from moespec_jax.cli.command import install_line
from moespec_jax.errors import CheckpointError, RequestError, platform_error


def main() -> int:
    """Run the command; returns the exit status: 0, or 2 for an error that the user can fix."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import moespec_jax.evaluate.harness  # noqa: F401 (registers the model)
    except ImportError as error:
        print(f"error: expected lm-eval to be installed: {install_line('eval')}; {error}", file=sys.stderr)
        return 2
    try:
        cli_evaluate()
    except (CheckpointError, RequestError, RuntimeError, AssertionError) as error:
        message = platform_error(error)
        if message is None and isinstance(error, RuntimeError | AssertionError):
            raise
        print(f"error: {message or ' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
