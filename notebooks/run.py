"""Execute notebooks in place: `python notebooks/run.py [NAME.ipynb ...]`, all of this directory unless some are named.

Each runs in a fresh kernel and in an empty directory of its own; what is written back names neither machine nor user.
Needs the `test` extra.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent


def execute(path: Path, directory: Path, environment: Mapping[str, str] | None = None) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `directory`; `environment` adds to the kernel's variables.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as sockets:
        client = NotebookClient(
            notebook,
            timeout=600,
            startup_timeout=180,
            kernel_name="python3",
            resources={"metadata": {"path": str(directory)}},
            # Not TCP, to which anyone on the machine could talk.
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute(env={**os.environ, **(environment or {})})
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def main() -> None:
    """Run what the command line names, and say how long each took."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            notebook = execute(path, Path(directory))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
