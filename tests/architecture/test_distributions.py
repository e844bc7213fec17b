"""What the manifests of the distributions say together: one version, ranges that fit it, the same classifiers."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import kernelry

ROOT = Path(__file__).parents[2]
WORKSPACE = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text())
PLUGINS = {path.parent.name: tomllib.loads(path.read_text()) for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
EVERY = {"core": CORE, **PLUGINS}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_has_the_version_of_the_core(name):
    assert PLUGINS[name]["project"]["dynamic"] == ["version"]
    read = ROOT / "plugins" / name / PLUGINS[name]["tool"]["hatch"]["version"]["path"]
    assert read.resolve() == ROOT / "core" / CORE["tool"]["hatch"]["version"]["path"]


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_requires_the_cores_of_its_own_minor_version(name):
    major, minor, *_ = Version(kernelry.__version__).release
    (requirement,) = [
        found for found in map(Requirement, PLUGINS[name]["project"]["dependencies"]) if found.name == "kernelry"
    ]
    assert requirement.specifier == Requirement(f"kernelry>={major}.{minor},<{major}.{minor + 1}").specifier


@pytest.mark.parametrize("name", EVERY)
def test_a_manifest_says_what_an_index_shows(name):
    project = EVERY[name]["project"]
    assert project["description"].endswith(".")
    assert all(project[field] for field in ("keywords", "authors", "readme"))
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    gpu = {"Environment :: GPU :: NVIDIA CUDA"}
    assert set(project["classifiers"]) - gpu == set(CORE["project"]["classifiers"])
    assert project["requires-python"] == CORE["project"]["requires-python"] == ">=3.11"


def test_licences_are_the_same():
    texts = {
        path.read_bytes() for path in (ROOT / "LICENSE", *ROOT.glob("core/LICENSE"), *ROOT.glob("plugins/*/LICENSE"))
    }
    assert len(texts) == 1


def test_the_workspace_installs_every_distribution():
    required = {Requirement(text).name for text in WORKSPACE["project"]["dependencies"]}
    assert required == {manifest["project"]["name"] for manifest in EVERY.values()}


def test_extras_with_the_same_library_require_the_same_versions():
    ranges = {}
    for manifest in EVERY.values():
        project = manifest["project"]
        groups = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
        for requirement in (Requirement(text) for group in groups for text in group):
            ranges.setdefault(requirement.name, set()).add(str(requirement.specifier))
    ranges.pop("kernelry")  # of itself with extras, and of the plugins
    assert {name: found for name, found in ranges.items() if len(found) > 1} == {}


@pytest.mark.parametrize(("variable", "group"), [("TEST_NEEDS", "test"), ("LINT_NEEDS", "lint")])
def test_make_installs_what_the_groups_say(variable, group):
    lines = re.findall(rf"^{variable}(?:_ALONE)? := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert " ".join(lines).replace('"', "").split() == WORKSPACE["dependency-groups"][group]


def test_the_workspace_cannot_be_uploaded():
    assert "Private :: Do Not Upload" in WORKSPACE["project"]["classifiers"]  # an index refuses it


def test_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version, date = headings[0]
    assert version == kernelry.__version__
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}|unreleased", date)
