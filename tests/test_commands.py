"""Common to all commands: their list, `--version`, one line for a platform that is absent, paths with `~`, reports."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import jax
import pytest
from jax._src import xla_bridge
from tiny import write_tiny
from tiny_pair import write_pair

import convert
import moespec_jax
from moespec_jax import __main__ as listing
from moespec_jax.checkpoint.hub import locate
from moespec_jax.cli.command import command_parser, install_line, require_matplotlib, run_command, write_tables
from moespec_jax.cli.generate_arguments import build_parser
from moespec_jax.cli.prompts import Prompt, gather_prompts
from moespec_jax.cli.wide_table import fitted, folded
from moespec_jax.errors import RequestError
from moespec_jax.generate import main
from moespec_jax.runtime.tuned_profile import read_profile, write_profile

ROOT = Path(__file__).parent.parent
# Modules with a `main(argv)`, by the name after `python -m`.
OWN = [name for name in listing.COMMANDS if name.startswith("moespec_jax.") and name != "moespec_jax.evaluate.lm_eval"]


def module_of(command: str) -> str:
    return f"{command}.__main__" if (ROOT / command.replace(".", "/")).is_dir() else command


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = set()
    for path in [*(ROOT / "moespec_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__main__")
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8") and "demo" not in parts:
            found.add(name)
    assert set(listing.COMMANDS) == found - {"moespec_jax", "moespec_jax.evaluate.limited"}
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, purpose in listing.COMMANDS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(purpose) and len(line) <= 80


def test_the_list_needs_no_jax() -> None:
    """It is the first thing that a user types."""
    program = "import sys, moespec_jax.__main__ as m; m.main([]); assert not {'jax', 'numpy'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "moespec_jax.generate" in run.stdout


@pytest.mark.parametrize("given", ["generate", "train.regenerate"])
def test_a_command_as_an_argument_is_named(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main([given, "--help-me"]) == 2
    assert capsys.readouterr().err == (
        f"error: expected no arguments; got {given!r}: run python -m moespec_jax.{given}\n"
    )


@pytest.mark.parametrize("name", ["moespec_jax", *OWN])
def test_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        import_module(module_of(name)).main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"moespec_jax {moespec_jax.__version__}\n"


def test_version_of_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert.make_parser("check", "Compare.").parse_args(["--version"])
    assert capsys.readouterr().out == f"moespec_jax {moespec_jax.__version__}\n"


def test_all_public_names_exist() -> None:
    assert set(dir(moespec_jax)) >= set(moespec_jax.__all__)
    for name in moespec_jax.__all__:
        assert getattr(moespec_jax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        moespec_jax.nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_names_of_type_checkers_are_those_at_run_time() -> None:
    tree = ast.parse((ROOT / "moespec_jax" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        (str(node.module).removeprefix("moespec_jax."), alias.name)
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(module, name) for module, names in moespec_jax._MODULES.items() for name in names}
    assert sorted(name for _, name in typed) == sorted(moespec_jax.__all__)


ABSENT = [
    "Unable to initialize backend 'cuda': INTERNAL: no supported devices found\n(set JAX_PLATFORMS='')",
    "Unable to initialize backend 'cuda': RESOURCE_EXHAUSTED: out of memory while creating a stream",
    "Unknown backend: 'nonsense' requested, but no platforms that are instances of nonsense are present.",
    "Backend 'tpu' is not in the list of known backends: ['cpu', 'cuda'].",
    "Backend 'tpu' failed to initialize: UNKNOWN: TPU initialization failed. Available backends are ['cpu']",
    "Could not initialize backend 'rocm'",
]


def absent(message: str) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise RuntimeError(message)

    return fail


@pytest.mark.parametrize("message", ABSENT)
def test_an_absent_platform_is_one_line(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command_parser("generate", ""), absent(message), []) == 2
    with pytest.raises(SystemExit) as exit:
        convert.run(absent(message))  # pyright: ignore[reportArgumentType]
    assert exit.value.code == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("error: expected a platform that JAX finds here (JAX_PLATFORMS=cpu); ")
        assert line.endswith(" ".join(message.split()))


def test_generate_finds_no_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax, "devices", absent(ABSENT[0]))
    assert main(["--model", str(write_tiny(tmp_path)), "--prompt-ids", "5"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Unable to initialize backend 'cuda'" in err


def test_other_errors_are_raised() -> None:
    def check(_: object) -> None:
        assert not "a bug"

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(command_parser("generate", ""), absent("a bug"), [])
    with pytest.raises(AssertionError):
        run_command(command_parser("generate", ""), check, [])


@pytest.mark.parametrize("platform", ["cuda", "rocm", "nonsense"])
def test_a_platform_without_its_plug_in(
    platform: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JAX's own function: where it knows the name of a platform and nothing else, its assertion fails."""
    monkeypatch.setattr(xla_bridge, "_backends", {})
    monkeypatch.setattr(xla_bridge, "_default_backend", None)
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", platform)
        assert run_command(command_parser("generate", ""), lambda _: print(xla_bridge.backends()), []) == 2
    finally:
        jax.config.update("jax_platforms", before)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"error: expected a platform that JAX finds here (JAX_PLATFORMS={platform}); ")


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["nonsense", "cuda", "tpu"])
@pytest.mark.parametrize(
    "command", ["moespec_jax.generate", "moespec_jax.bench", "convert.probe_draft --model {0} --draft-model {1}"]
)
def test_platforms_that_are_not_here(platform: str, command: str) -> None:
    demo = [str(ROOT / "moespec_jax" / "demo" / part) for part in ("target", "draft")]
    words = [word.format(*demo) for word in command.split()]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    run = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith(
        f"error: expected a platform that JAX finds here (JAX_PLATFORMS={platform}); "
    )
    assert "Traceback" not in run.stderr


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_home_directory_is_expanded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(home / "model")
    (home / "prompts.txt").write_text("abc\n")
    profile = moespec_jax.TreeConfig(1, 1, 2)
    write_profile(home / "profile.json", profile, None, {})
    assert moespec_jax.load("~/model").directory == home / "model" == locate("~/model")
    assert read_profile("~/profile.json") == {"tree": profile, "budget": None}
    flags = ["--model=~/model", "--prompt-file=~/prompts.txt", "--prompt=~/x", "--profile=~/none.json"]
    prompts = gather_prompts(build_parser("").parse_args(flags), str)
    assert prompts == [Prompt("~/x"), Prompt("abc")], "a prompt is no path"
    assert main(flags[:1] + flags[3:] + [f"--draft-model={home}"]) == 2
    assert capsys.readouterr().err == f"error: expected a file none.json in {home}; there is none\n"


def test_path_flags_are_expanded(home: Path) -> None:
    parser = command_parser("bench", "")
    parser.add_argument("--output", type=Path)
    parser.add_argument_group("files").add_argument("--data", type=Path, nargs="+")
    found = parser.parse_args(["--output=~/out", "--data", "~/a", "b", "~no-user-of-this-name/c"])
    assert found.output == home / "out"
    assert found.data == [home / "a", Path("b"), Path("~no-user-of-this-name/c")]


def test_messages_name_an_installation_that_works() -> None:
    """From a clone: the project is on no package index."""
    assert install_line("plots") == 'python -m pip install -e ".[plots]"'
    for path in [
        *(ROOT / "moespec_jax").rglob("*.py"),
        *(ROOT / "convert").rglob("*.py"),
        *(ROOT / "docs").glob("*.md"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert "pip install moespec" not in text and "pip install 'moespec" not in text, path


def test_matplotlib_is_missed_at_the_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match="expected matplotlib"):
        require_matplotlib()
    for name in ("bench", "evaluate", "study", "tune"):
        assert import_module(f"moespec_jax.{name}.__main__").main(["--model", "no/such/model"]) == 2
        assert capsys.readouterr().err == (
            f"error: expected matplotlib, which draws the figures: {install_line('plots')}\n"
        )


HEAD = ["| setting | tokens a round | over plain decoding, median and range | output |", "| --- | --- | --- | --- |"]
ROWS = ["| 60/7/10 | 3.7 | 1.20x (1.10 to 1.25) | exact |", "| 4/2/1 |  | 0.9x | LOSSY |"]


@pytest.mark.parametrize("width", [30, 40, 60, 200])
def test_tables_fit(width: int) -> None:
    text = "\n".join(["Title, of any length, and | with a bar.", "", *HEAD, *ROWS, "", "end"])
    lines = fitted(text, width).split("\n")
    assert lines[0] == text.split("\n")[0] and lines[-2:] == ["", "end"]
    inside = lines[2:-2]
    assert max(map(len, inside)) <= width
    if width == 200:
        assert inside == [*HEAD, *ROWS]
        return
    words = {word for line in [HEAD[0], *ROWS] for word in line.split()}
    assert {word for line in inside for word in line.split() if set(word) != {"-"}} == words, "no cell is lost"
    first = [line.split()[1] for line in inside if line.split()[1:2] in (["60/7/10"], ["4/2/1"])]
    assert len(first) >= 2 and first == ["60/7/10", "4/2/1"] * (len(first) // 2), "every part has the first column"


def test_a_report_in_a_file_is_not_rearranged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    write_tables("\n".join(HEAD))
    assert capsys.readouterr().out == "\n".join(HEAD)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write_tables("\n".join(HEAD))
    assert max(map(len, capsys.readouterr().out.split("\n"))) <= 40


def test_long_lines_are_indented() -> None:
    rows = [
        ("model", "tiny"),
        ("experts", "3.2 of 32 read per layer and pass, 5.0 selected"),
        ("device", "/a/" + 30 * "b"),
    ]
    text = "\n".join(f"{name:12} {value}" for name, value in rows)
    lines = folded(text, 40, 13).split("\n")
    assert lines == [
        "model        tiny",
        "experts      3.2 of 32 read per layer",
        "             and pass, 5.0 selected",
        "device",
        f"             /a/{30 * 'b'}",
    ]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_heads_have_the_mode_of_new_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        head = Path(write_pair(tmp_path, 1)[3])
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in head.iterdir()} == {
        name: 0o666 & ~mask for name in ("config.json", "model.safetensors")
    }
