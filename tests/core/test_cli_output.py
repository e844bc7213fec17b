"""What the command prints: texts as they were looked at, narrow terminals, colours, pipes, statuses, completion.

tests/core/golden holds the texts. After a change that is meant, `GOLDEN=write pytest tests/core/test_cli_output.py`
writes them again: look at the difference before it is committed.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from kernelry import cli
from kernelry.cli import app, output
from kernelry.cli.output import Paragraph, console
from kernelry.errors import ConfigError
from kernelry.policy.lock import Lock
from kernelry.policy.policy import Switches

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (60, 80, 140)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments, width=80):
        monkeypatch.setattr(sys, "argv", ["kernelry", *arguments])
        monkeypatch.setattr(console, "_width", width)
        status = cli.main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


QUESTIONS = {
    "served": (
        "--target",
        "tpu:v5e",
        "--q-len",
        "200",
        "--head-dim",
        "80",
        "--heads",
        "8",
        "--kv-heads",
        "2",
        "--sinks",
    ),
    "preferred": (
        *("--target", "gpu:h100", "--q-len", "8192", "--heads", "32", "--kv-heads", "8"),
        *("--mask", "window(1023)", "--soft-cap", "50"),
    ),
    "all": ("--target", "gpu:h100", "--mode", "decode", "--q-len", "1", "--kv-len", "4096", "--all"),
    "refused": ("--target", "tpu:v6e", "--context-parallel", "ring:context:4", "--dtype", "float64"),
    "named": ("--target", "gpu:h100", "--kernel", "fa4", "--head-dim", "96"),
    "two-targets": ("--target", "cpu", "--target", "tpu:v6e", "--dtype", "float32"),
    "config": ("--target", "gpu:a100", "--config", "config.toml", "--mode", "prefill", "--no-sinks"),
    "model": ("--model", "gpt-oss-120b", "--q-len", "8192", "--target", "tpu:v6e", "--target", "gpu:h100"),
    "sharding": (
        *("--target", "tpu:v5e", "--q-len", "8192", "--batch", "8", "--heads", "32", "--kv-heads", "8"),
        *("--sharding", "batch=d:4 heads=t:2 sequence=c:8 ring dual"),
    ),
}
REFUSED = {"refused"}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    switches = Switches(measurements=str(tmp_path / "times.json"))
    monkeypatch.setattr("kernelry.policy.policy._of_process", lambda: switches)
    (tmp_path / "config.toml").write_text("[attention]\ntype = 'local_sliding'\nwindow = 512\nsinks = true\n")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="flywheel serves from Python 3.12 on, which the texts lack")
@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_explain_prints_what_was_looked_at(run, config, name, width):
    status, out, err = run("explain", *QUESTIONS[name], width=width)
    assert (status, err) == (2 if name in REFUSED else 0, "")
    path = GOLDEN / f"explain-{name}-{width}.txt"
    text = out.replace(f" {importlib.metadata.version('kernelry')}]", " VERSION]")
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
    assert_readable(out, width)


def test_the_page_shows_the_first_of_them():
    page = (Path(__file__).parents[2] / "docs" / "explanations.md").read_text()
    shown = (GOLDEN / "explain-served-80.txt").read_text().replace(" VERSION]", " 0.1.0]")
    assert f"```\nkernelry explain {' '.join(QUESTIONS['served'])}\n```\n\n```text\n{shown}```\n" in page


def assert_readable(text, width):
    """No line is longer than the terminal, unless it is one word, and no word is cut."""
    for line in text.splitlines():
        assert len(line) <= width or len(line.split()) == 1, line
    assert not re.search(r"[^\s,]…", text), text


def test_no_golden_text_is_left_over():
    names = {f"explain-{name}-{width}.txt" for name in QUESTIONS for width in WIDTHS}
    assert {path.name for path in GOLDEN.iterdir()} == names


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("list", "--all"),
        ("doctor",),
        ("mask", "causal & window(100)", "--q-len", "4096"),
        ("lock", "config.toml", "--target", "cpu", "--target", "tpu:v6e", "--cache", "paged:16:int8"),
        ("lock", "config.toml", "--check", "--file", "config.lock.json"),
        ("check", "config.toml", "--target", "tpu:v5e:9x8"),
        ("tune", "config.toml", "--q-len", "64", "--kernel", "blockwise", "--max-tilings", "2", "--target", "tpu:v5e"),
        ("explain", "--model", "gemma-3-27b", "--target", "tpu:v6e", "--target", "gpu:h100"),
    ],
    ids=lambda arguments: " ".join(arguments)[:24],
)
def test_every_verb_is_readable_in_60_columns(run, config, arguments):
    if "--check" in arguments:
        run("lock", "config.toml", "--target", "cpu", "--file", "config.lock.json")
    _, out, err = run(*arguments, width=60)
    assert out, err
    assert_readable(out, 60)


def test_a_word_that_is_longer_than_a_line_is_whole():
    shown = io.StringIO()
    output.Console(width=20, file=shown).print(Paragraph("see /a/path/that/is/longer/than/it now", 2), crop=False)
    assert shown.getvalue() == "  see\n    /a/path/that/is/longer/than/it\n    now\n"


STATUSES = {
    0: [
        ("list", "ragged"),
        ("doctor",),
        ("explain", "--target", "cpu"),
        ("mask", "causal"),
        ("schema",),
        ("bench", "--list"),
        ("new-plugin", "mine"),
        ("lock", "config.toml", "--target", "cpu"),
        (),
        ("--version",),
        ("explain", "--help"),
    ],
    1: [
        ("lock", "refused.toml", "--target", "cpu"),
        ("lock", "config.toml", "--check", "--file", "empty.lock.json"),
        ("tune", "config.toml", "--q-len", "64", "--kernel", "blockwise", "--budget", "0"),
    ],
    2: [
        ("list", "no_such_kernel"),
        ("doctor", "more"),
        ("explain", "--target", "cpu", "--kernel", "splash"),
        ("explain", "--model", "llama-3-8b", "--target", "cpu", "--kernel", "splash"),
        ("mask", "no_such_mask"),
        ("schema", "--table", "model."),
        ("bench", "--shape", "no_such_shape"),
        ("new-plugin", "Mine"),
        ("lock",),
        ("check", "config.toml"),
        ("tune", "config.toml", "--target", "gpu:h100"),
        ("conformance",),
        ("conformance", "no_such_kernel"),
        ("no_such_verb",),
    ],
}


@pytest.mark.parametrize(
    ("status", "arguments"),
    [(status, each) for status, all_of_them in STATUSES.items() for each in all_of_them],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, tuple) else str(value),
)
def test_statuses_of_every_verb(run, config, tmp_path, status, arguments):
    (tmp_path / "refused.toml").write_text("[[attention.rules]]\nuse = ['splash']\n")
    Lock(()).write(tmp_path / "empty.lock.json")
    found, out, err = run(*arguments)
    assert found == status, out + err
    assert "Traceback" not in err
    assert (err == "") == (status < 2 or arguments[:1] == ("explain",)), err


def test_statuses_have_a_test_for_every_verb_and_are_documented(run):
    page = (Path(__file__).parents[2] / "docs" / "command.md").read_text()
    for verb in app.VERBS:
        assert f"`kernelry {verb}" in page or f"kernelry {verb} " in page, verb
        assert any(verb in arguments for arguments in STATUSES[0] + STATUSES[2]), verb
    assert "Exit status: 0 all is well; 1 the command ran and found something wrong" in " ".join(
        run("--help")[1].split()
    )


def test_ctrl_c_ends_with_130_and_without_a_traceback(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("kernelry.registry.installed.registry", interrupted)
    status, out, err = run("list")
    assert (status, out, err.strip()) == (130, "", "")


def test_the_command_alone_is_its_help(run):
    assert run()[1] == run("--help")[1]


def test_usage_errors_name_the_command_as_it_was_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "explian"])
    assert cli.main("python -m kernelry") == 2
    err = capsys.readouterr().err
    assert err.splitlines()[0] == "Usage: python -m kernelry [OPTIONS] COMMAND [ARGS]..."
    assert "╭" not in err


# Shells


@pytest.fixture
def complete(run, monkeypatch):
    def call(*words, shell="bash"):
        monkeypatch.setenv("_KERNELRY_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", "\n".join(("kernelry", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(("kernelry", *words)))
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        status, out, err = run()
        assert (status, err) == (0, "")
        return out.split("\n")[:-1]

    return call


def test_verbs_and_options_are_completed(complete):
    assert complete("ex") == ["explain"]
    assert complete("explain", "--layer") == ["--layer-kind"]


def test_names_are_completed(complete):
    assert complete("explain", "--mode", "") == ["train", "prefill", "decode"]
    assert complete("lock", "--model", "gemma-3") == ["gemma-3-27b"]
    assert complete("explain", "--dtype", "float") == ["float16", "float32", "float64"]
    assert complete("list", "fly") == ["flywheel", "flywheel_paged"]
    assert complete("conformance", "splash", "pal") == ["pallas_decode", "pallas_flash", "pallas_mha"]
    assert complete("explain", "--kernel", "au") == ["auto"]
    assert complete("explain", "--model", "no-such") == [""]
    assert complete("bench", "--pass", "for") == ["forward", "forward+backward"]
    assert complete("bench", "--shape", "small-mla") == ["small-mla", "small-mla-decode"]


def test_bash_divides_words_at_colons_and_replaces_what_follows(complete):
    assert complete("explain", "--target", "gpu", ":", "h") == ["h100", "h200"]
    assert complete("explain", "--target", "tpu", ":") == ["v4", "v5e", "v5p", "v6e", "tpu7x"]
    assert complete("explain", "--target", "=", "gpu", ":", "h1") == ["h100"]
    assert complete("check", "--target", "tpu", ":", "v5e", "--target", "gpu:b") == ["b200"]
    assert complete("explain", "--target", "tpu", ":", "v5e", "--mode", "t") == ["train"]


def test_zsh_and_fish_get_whole_words(complete):
    assert complete("explain", "--target", "gpu:h", shell="fish") == ["gpu:h100", "gpu:h200"]
    assert "gpu" in complete("explain", "--target", "gpu:h", shell="zsh")[0]


def test_an_error_completes_nothing(run, monkeypatch, complete):
    def broken():
        raise ConfigError("no registry")

    monkeypatch.setattr("kernelry.registry.installed.registry", broken)
    monkeypatch.setenv("_KERNELRY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "kernelry\nlist\nfl")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run() == (1, "", "")


# Terminals and pipes, in processes of their own


ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("KERNELRY_", "COLUMNS", "PYTEST"))}
ENVIRON |= {"JAX_PLATFORMS": "cpu", "KERNELRY_MEASUREMENTS": "", "TERM": "xterm-256color"}
ENVIRON.pop("NO_COLOR", None)
IN_ENVIRONMENTS = """
import json, os, sys
environments = json.loads(sys.argv[1])
from kernelry.cli import main
sys.argv = ["kernelry", "--help"]
main()
print([name for name in sys.modules if name in ("kernelry.aot", "kernelry.testing", "kernelry.cli.explain")])
for variables in environments:
    os.environ.update(variables)
    for name in [name for name in sys.modules if name.startswith("kernelry.cli")]:
        del sys.modules[name]
    from kernelry.cli import main, output
    sys.argv = ["kernelry", "explain", "--target", "cpu", "--q-len", "64"]
    main()
    print("bars" if not output.progress().disable else "no bars")
    print("END")
    for name in variables:
        del os.environ[name]
"""


def in_a_terminal(*environments):
    """What is printed to a terminal of 100 columns, with these variables one after another."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (40, 100))
    command = [sys.executable, "-c", IN_ENVIRONMENTS, json.dumps(environments)]
    process = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, env=ENVIRON)
    os.close(there)
    found = b""
    with contextlib.suppress(OSError):  # at its end on Linux
        while more := os.read(here, 65536):
            found += more
    os.close(here)
    assert process.wait() == 0, found
    return found.decode().replace("\r", "").split("END\n")[:-1]


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d|10\d)")


def test_a_terminal_has_styles_bars_and_its_own_width():
    plain, no_color, dumb = in_a_terminal({}, {"NO_COLOR": "1"}, {"TERM": "dumb"})
    assert "\x1b[1m" in plain
    assert not COLOUR.search(no_color)
    assert "\x1b" not in dumb
    assert [text.splitlines()[-1] for text in (plain, no_color, dumb)] == ["bars", "bars", "no bars"]
    assert 80 < max(len(re.sub("\x1b[^m]*m", "", line)) for line in plain.splitlines()) <= 100


def test_a_pipe_has_no_codes_and_no_bars_unless_colours_are_forced(monkeypatch):
    command = [sys.executable, "-c", IN_ENVIRONMENTS, json.dumps([{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "50"}])]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, check=True)
    plain, forced, narrow = done.stdout.split("END\n")[:-1]
    assert "\n[]\n" in plain, "the help imports verbs"
    assert done.stderr == ""
    assert "\x1b" not in plain
    assert "\x1b[1m" in forced
    assert [text.splitlines()[-1] for text in (plain, forced)] == ["no bars", "no bars"]
    assert 60 < max(map(len, plain.splitlines())) <= 80
    assert max(map(len, narrow.splitlines())) <= 50


def test_a_closed_pipe_is_141_and_silent():
    process = subprocess.Popen(
        [sys.executable, "-m", "kernelry", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRON
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    process.stderr.close()
