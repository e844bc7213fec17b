"""The gate, .ci/run: what it names exists, so that no step fails after twenty minutes for a file that was moved."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
GATE = (ROOT / ".ci" / "run").read_text()


def test_it_is_valid_bash():
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0


def test_every_step_is_a_target_of_make():
    makefile = (ROOT / "Makefile").read_text()
    environments = dict(re.findall(r"^(\w*VENV) \?= (\S+)$", makefile, re.MULTILINE))
    for name, folder in environments.items():
        makefile = makefile.replace(f"$({name})", folder)
    targets = set(re.findall(r"^([\w./-]+):", makefile, re.MULTILINE))
    steps = re.findall(r"^[^#\n]*\bmake ([^#&|;}\n\\]+)", GATE, re.MULTILINE)
    named = {word for step in steps for word in re.split(r"\s+\w+=", step)[0].split()}
    assert {"lint", "test", ".venv/.installed"} <= named
    assert {name.replace(".venv-312", ".venv") for name in named} - targets == set()


def test_every_file_of_tests_that_it_names_exists():
    files = re.findall(r"\b(?:tests|examples)/[\w./-]+", GATE)
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []
