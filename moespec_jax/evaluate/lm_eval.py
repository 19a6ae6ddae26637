"""Run lm-evaluation-harness with the model `moespec` registered; all arguments are those of `lm_eval`:

    python -m moespec_jax.evaluate.lm_eval run --model moespec --tasks gsm8k ...

Also accepts `--mesh` of the other commands, which is the model argument `mesh`. Versions of lm-eval that load plug-ins
do not need this module.
"""
# pyright: reportMissingImports=false

import re
import sys
from collections.abc import Sequence

from moespec_jax.cli.command import Parser, error_line, install_line
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
        sys.argv[1:] = with_mesh_argument(sys.argv[1:])
        cli_evaluate()
    except (CheckpointError, RequestError, RuntimeError, AssertionError) as error:
        message = platform_error(error)
        if message is None and isinstance(error, RuntimeError | AssertionError):
            raise
        print(error_line(error) if message is None else f"error: {message}", file=sys.stderr)
        return 2
    return 0


def with_mesh_argument(argv: Sequence[str]) -> list[str]:
    """Move `--mesh` into the model arguments, in which slashes stand for commas.

    Raises:
        RequestError: it has no value, or there is one among the model arguments too.
    """
    parser = Parser(prog="lm_eval", allow_abbrev=False, add_help=False)
    parser.add_argument("--mesh")
    parser.add_argument("--model_args", "-a", nargs="*")
    found, rest = parser.parse_known_args(list(argv))
    if found.mesh is None:
        return list(argv)
    texts, mesh = found.model_args or [], found.mesh.replace(",", "/")
    if any(re.search(r'(?:^|,)\s*mesh=|"mesh"\s*:', text) for text in texts):
        raise RequestError("expected one mesh: of --mesh, or of --model_args; got both")
    if len(texts) == 1 and texts[0].lstrip().startswith("{"):  # JSON
        return [*rest, "--model_args", texts[0].rstrip()[:-1] + f', "mesh": "{mesh}"' + "}"]
    return [*rest, "--model_args", ",".join([*texts, f"mesh={mesh}"])]


if __name__ == "__main__":
    sys.exit(main())
