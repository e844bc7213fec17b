"""The files that `make dist` built: what is in them, and that they work alone, on every Python that is supported."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import kernelry

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
FOLDERS = {
    path.parent.name: path.parent for path in (ROOT / "core/pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml"))
}
PYTHONS = ("3.11", "3.12", "3.13")
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("KERNELRY_", "PYTHON", "VIRTUAL_ENV"))}


def built(folder, pattern):
    """The one file of a distribution in dist/ that matches, as in {}-*.whl."""
    name = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["name"].replace("-", "_")
    files = list((ROOT / "dist").glob(pattern.format(name)))
    assert len(files) == 1, f"{len(files)} files {pattern.format(name)} in dist/: make dist first"
    return files[0]


def wheels():
    return [built(folder, "{}-*.whl") for folder in FOLDERS.values()]


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_a_wheel_has_its_licence_and_its_types(folder):
    names = zipfile.ZipFile(built(folder, "{}-*.whl")).namelist()
    packages = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {path.name for path in (folder / "src").iterdir()}
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_a_source_archive_can_be_built_alone(folder):
    archive = built(folder, "{}-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    top = archive.name.removesuffix(".tar.gz")
    assert {f"{top}/{name}" for name in ("LICENSE", "README.md", "PKG-INFO", "pyproject.toml")} <= set(names)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_metadata_is_complete(folder):
    wheel = zipfile.ZipFile(built(folder, "{}-*.whl"))
    metadata = email.message_from_bytes(
        wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")))
    )
    assert metadata["Version"] == kernelry.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert all(metadata[field] for field in ("Author", "Summary", "Keywords", "Description-Content-Type"))
    assert "pip install" in metadata.get_payload() or metadata["Name"] == "kernelry"  # the README
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: {version}" for version in PYTHONS} <= set(classifiers)


def test_dist_has_nothing_else():
    expected = {built(folder, pattern) for folder in FOLDERS.values() for pattern in ("{}-*.whl", "{}-*.tar.gz")}
    assert set((ROOT / "dist").iterdir()) == expected


def interpreter(version):
    """The path of an interpreter of a version such as 3.12, also of one of pyenv's that is not switched on; or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in (f"python{version}", *pyenv.glob(f"versions/{version}.*/bin/python")):
        code = "import sys; print(sys.executable)"
        done = shutil.which(candidate) and subprocess.run(
            [candidate, "-c", code], capture_output=True, text=True, check=False
        )
        if done and done.returncode == 0:
            return done.stdout.strip()
    return None


class Environment:
    """A fresh environment with the wheels of dist/ and, from the index, what they require."""

    def __init__(self, folder, python):
        self.folder = folder / "venv"
        self.uv("venv", "--python", python, self.folder)
        self.uv("pip", "install", "--python", self.folder, *wheels())  # by their paths: none comes from an index

    def uv(self, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", "uv", *arguments], env=CLEAN, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def run(self, command, *arguments):
        environ = {**CLEAN, "JAX_PLATFORMS": "cpu", "KERNELRY_MEASUREMENTS": ""}
        done = subprocess.run(
            [self.folder / "bin" / command, *arguments],
            env=environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module", params=PYTHONS)
def environment(request, tmp_path_factory):
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"no Python {request.param} on this machine")
    return Environment(tmp_path_factory.mktemp(f"python-{request.param}"), python)


def test_requirements_are_met(environment):
    assert "All installed packages are compatible" in environment.uv("pip", "check", "--python", environment.folder)


def test_doctor_finds_no_fault(environment):
    said = json.loads(environment.run("kernelry", "doctor", "--json"))
    assert said["faults"] == []
    assert len(said["plugins"]) == len(FOLDERS) - 1


def test_attention_has_the_references_outputs_and_gradients(environment):
    said = json.loads(environment.run("python", "-W", "error", ROOT / "tests" / "install" / "smoke.py"))
    assert Path(said["file"]).is_relative_to(environment.folder)
    assert len(said["versions"]) == len(FOLDERS)
    assert set(said["versions"].values()) == {kernelry.__version__}


def test_a_kernel_for_a_tpu_is_explained(environment):
    said = environment.run(
        "kernelry", "explain", "--target", "tpu:v6e", "--q-len", "4096", "--mask", "causal", "--json"
    )
    assert json.loads(said)["plan"]["kernel"] == "splash"
