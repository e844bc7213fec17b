"""Rules of the house that a linter does not know."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("core/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")])
_PRIVATE = re.compile(r"^\s*(?:from|import)\s+\S*\._\w+|jax\._src", re.MULTILINE)


def test_there_are_sources_to_look_at():
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_vendor_modules_are_imported_in_one_place_only(path):
    if path.name in ("_vendor.py", "_compat.py"):
        return
    own = re.compile(r"(from|import) kernelry\S*")
    lines = [line for line in path.read_text().splitlines() if _PRIVATE.search(line) and not own.search(line)]
    assert lines == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small_enough_to_read(path):
    assert path.read_text().count("\n") < 350


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_definitions_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("plugin", sorted(path.name for path in ROOT.glob("plugins/*")))
def test_every_plugin_is_its_own_distribution(plugin):
    folder = ROOT / "plugins" / plugin
    manifest = (folder / "pyproject.toml").read_text()
    assert f'{plugin} = "kernelry_{plugin}.plugin"' in manifest
    assert (folder / "src" / f"kernelry_{plugin}" / "py.typed").exists()
    assert (folder / "README.md").exists()
    assert (folder / "LICENSE").exists()
