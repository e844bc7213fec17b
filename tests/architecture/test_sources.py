"""Rules of the house that a linter does not know: each names the files that break it."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("core/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")])
_PRIVATE = re.compile(r"^\s*(?:from|import)\s+\S*\._\w+|jax\._src", re.MULTILINE)
_UNSTABLE = re.compile(r"jax\.(_src|interpreters|extend)\b")
"""What JAX keeps for itself and for libraries, and may change with any release."""
_OWN = re.compile(r"(from|import) kernelry\S*")


@functools.cache
def text_of(path):
    return path.read_text(encoding="utf-8")


def breaking(is_broken):
    """The sources about which the rule says something, with what it says."""
    said = {str(path.relative_to(ROOT)): is_broken(path) for path in SOURCES}
    return {path: words for path, words in said.items() if words}


def private_imports(path):
    if path.name in ("_vendor.py", "_compat.py"):
        return []
    return [line for line in text_of(path).splitlines() if _PRIVATE.search(line) and not _OWN.search(line)]


def unstable_jax(path):
    """Of core; a plugin wraps what a vendor has."""
    if path.name == "_compat.py" or not path.is_relative_to(ROOT / "core"):
        return []
    return [line for line in text_of(path).splitlines() if _UNSTABLE.search(line)]


def undocumented(path):
    tree = ast.parse(text_of(path))
    public = (node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    names = [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]
    return names if ast.get_docstring(tree) else ["the module", *names]


def test_there_are_sources_to_look_at():
    assert len(SOURCES) > 30


def test_private_vendor_modules_are_imported_in_one_place_only():
    assert breaking(private_imports) == {}


def test_core_uses_what_jax_may_change_in_one_place_only():
    assert breaking(unstable_jax) == {}
    assert _UNSTABLE.search(text_of(ROOT / "core/src/kernelry/_compat.py"))


def test_files_stay_small_enough_to_read():
    assert breaking(lambda path: max(0, text_of(path).count("\n") - 400)) == {}


def test_public_definitions_are_documented():
    assert breaking(undocumented) == {}


def test_the_rules_see_what_they_look_for(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("from jax._src import core\n\ndef public():\n    pass\n\ndef _private():\n    pass\n")
    assert private_imports(path) == ["from jax._src import core"]
    assert undocumented(path) == ["the module", "public"]


@pytest.mark.parametrize("plugin", sorted(path.name for path in ROOT.glob("plugins/*")))
def test_every_plugin_is_its_own_distribution(plugin):
    folder = ROOT / "plugins" / plugin
    manifest = (folder / "pyproject.toml").read_text()
    assert f'{plugin} = "kernelry_{plugin}.plugin"' in manifest
    assert (folder / "src" / f"kernelry_{plugin}" / "py.typed").exists()
    assert (folder / "README.md").exists()
    assert (folder / "LICENSE").exists()
