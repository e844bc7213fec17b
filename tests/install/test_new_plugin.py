"""What authors of plugins do: docs/writing-a-kernel.md is followed, and a plugin is installed without a network."""

import json
import os
import subprocess

import pytest
import walk_through
from fresh_venv import CLEAN, ROOT

pytestmark = pytest.mark.install

STEPS = walk_through.steps_of((ROOT / "docs" / "writing-a-kernel.md").read_text())


@pytest.fixture(scope="module")
def folder(complete):
    folder = complete.sources / "author"
    folder.mkdir()
    yield folder
    complete.pip("uninstall", "-y", "kernelry-mine", "kernelry-other-kernel")


def _shell(venv, folder, command, **variables):
    path = os.pathsep.join([str(venv.bin), CLEAN["PATH"]])
    environ = {
        **CLEAN,
        "PATH": path,
        "COLUMNS": "200",
        "JAX_PLATFORMS": "cpu",
        "KERNELRY_MEASUREMENTS": "",
        **variables,
    }
    run = ["bash", "-e", "-o", "pipefail", "-c", command]
    done = subprocess.run(run, env=environ, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_walk_through_can_be_followed(complete, folder):
    for step in STEPS:
        if step.title:
            walk_through.edit(folder, step)
        for command, shown in step.commands if step.language == "console" else ():
            walk_through.check_printed(shown, _shell(complete, folder, command))


def test_a_new_plugin_is_installed_without_a_network_where_hatchling_is(complete, folder):
    complete.pip("install", "hatchling")
    last = _shell(complete, folder, "kernelry new-plugin other-kernel").splitlines()[-1].strip()
    _shell(complete, folder, last, PIP_NO_INDEX="1")
    listed = json.loads(_shell(complete, folder, "kernelry list --json"))["kernels"]
    assert "kernelry-other-kernel 0.1.0" in [kernel["distribution"] for kernel in listed]
    assert json.loads(_shell(complete, folder, "kernelry doctor --json"))["faults"] == []
