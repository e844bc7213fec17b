"""Rules of this project that a linter does not know: each names the files that break it."""

import ast
import bisect
import functools
import itertools
import pkgutil
import re
from pathlib import Path

import pytest

import kernelry

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
    defined = (node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    public = (node for node in defined if "overload" not in map(ast.unparse, node.decorator_list))
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


_TEXTS = (
    *("core/src/**/*.py", "plugins/*/src/**/*.py", "examples/**/*.py", "benchmarks/**/*.py"),
    *("*.md", "core/*.md", "plugins/*/*.md", "docs/**/*.md", "benchmarks/**/*.md"),
    *("Makefile", ".ci/run", "pyproject.toml", "core/pyproject.toml", "plugins/*/pyproject.toml"),
)
PROSE = sorted({path for pattern in _TEXTS for path in ROOT.glob(pattern)})
"""What users and contributors read. Tests are not among it: their support modules are named after stand-ins."""

IDIOMS = {
    r"held to": "compared with, tested against",
    r"hold(?:s|ing)? (?:(?:a|an|the|every|each|all) )?(?:\w+ )?to (?:what|everything|the oracle)": "test against",
    r"(?:stands?|stood|standing) in": "is in, is stored in, replaces",
    r"(?:stands?|stood|standing) for": "means, represents",
    r"(?<!there )is no (?!longer|more|less|fewer|other|such|better|worse)\w+": "is not a",
    r"nobody": "no one, or who it is: no query, no row",
    r"beside": "next to, with, besides, compared with",
    r"rooms": "packages, modules",
    r"loses? (?:its|their) way": "fails, gives up",
    r"laborious": "costly",
    r"catalogue": "list",
    r"at home": "on this machine",
    r"at hand": "on this machine, present, available",
    r"knows? (?:nothing|no|neither)": "does not know, does not have, does not support",
    r"wants": "needs, requires, asks for",
    r"(?:kernels?|compilers?|programs?|shapes|blocks|calls|both|they) want": "need, require, ask for",
    r"for want of": "because … is missing",
    r"go(?:es)? before": "takes precedence over, overrides",
    r"houses?": "package, project",
    r"lying kernels?": "deliberately wrong kernels",
    r"turn(?:s|ed|ing)? (?:\w+ ){0,3}around": "transpose",
    r"without a word": "silently",
    r"(?:who comes|who has|whoever)": "the caller, users of",
    r"beyond it": "is not supported",
    r"must be as many": "must have the same length",
    r"need not be (?:here|there)": "need not be present",
    r"speaks? of": "is about",
    r"for good": "for the rest of the process, permanently",
}
"""Idioms that readers of plain English stumble over, and what to write instead."""


@functools.cache
def _compiled(idiom):
    return re.compile(rf"\b(?:{idiom})\b", re.IGNORECASE)


def idioms_in(text):
    """Yields the line, the words and what to write instead, of every idiom, also of one broken over two lines."""
    words = [(word, line) for line, row in enumerate(text.splitlines(), 1) for word in row.split() if word != "#"]
    starts = [0, *itertools.accumulate(len(word) + 1 for word, _ in words)]
    joined = " ".join(word for word, _ in words)
    for idiom, instead in IDIOMS.items():
        for found in _compiled(idiom).finditer(joined):
            yield words[bisect.bisect_right(starts, found.start()) - 1][1], found.group(), instead


@pytest.mark.parametrize("folder", sorted({path.relative_to(ROOT).parts[0] for path in PROSE}))
def test_words_are_plain_english(folder):
    files = {str(path.relative_to(ROOT)): path for path in PROSE if path.relative_to(ROOT).parts[0] == folder}
    found = {name: [*idioms_in(text_of(path))] for name, path in files.items()}
    said = [
        f"{name}:{line}: {words!r}: write {instead}" for name, each in found.items() for line, words, instead in each
    ]
    assert not said, "\n".join(said)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Other kernels are held to it.", ["held to"]),
        ("Holds a kernel to what it declares.", ["Holds a kernel to what"]),
        ("keys that stand\n# in pages", ["stand in"]),
        ("logits_dtype is no dtype", ["is no dtype"]),
        ("there is no dtype, and it is no longer so", []),
        ("slots that\nnobody may see", ["nobody"]),
        ("read beside the inputs", ["beside"]),
        ("read besides the inputs", []),
        ("room for three", []),
        ("a stand-in, a warehouse, what is wanted", []),
        ("jax 0.10 wants all", ["wants"]),
    ],
)
def test_idioms_are_found_where_they_are(text, words):
    assert [found for _, found, _ in idioms_in(text)] == words


PUBLIC = {
    "aot",
    "cache",
    "config",
    "errors",
    "flax",
    "masks",
    "moba",
    "models",
    "parallel",
    "pictures",
    "plugin",
    "testing",
}
"""Modules of kernelry that users and plugins may import; of a package, the names that it exports are public."""

CORE = ROOT / "core" / "src" / "kernelry"


def docstring_of(module):
    path = CORE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.get_docstring(ast.parse(text_of(path))) or ""


def modules_in(*folder):
    found = pkgutil.iter_modules([str(CORE.joinpath(*folder))])
    return {module.name: module.ispkg for module in found if not module.name.startswith("_")}


def test_every_module_is_public_or_says_that_it_is_internal():
    found = modules_in()
    assert set(found) >= PUBLIC
    assert [name for name in found if name not in PUBLIC and "Internal" not in docstring_of(name)] == []
    assert [name for name in PUBLIC if "Internal" in docstring_of(name)] == []


def test_packages_that_are_public_say_that_their_modules_are_internal():
    packages = [name for name, is_package in modules_in().items() if is_package and name in PUBLIC]
    assert [name for name in packages if "modules are internal" not in docstring_of(name)] == []
    inner = {f"{name}.{each}" for name in packages for each, is_package in modules_in(name).items() if is_package}
    exported = {name for name in inner if name.split(".")[1] in getattr(kernelry, name.split(".")[0]).__all__}
    assert [name for name in sorted(inner - exported) if "Internal" not in docstring_of(name)] == []


IMPORTING = sorted(
    path
    for place in ("plugins/*/src", "examples", "tests/fixtures/third_party")
    for path in ROOT.glob(f"{place}/**/*.py")
)


def _imports(text):
    """The modules of kernelry that Python source imports; `from kernelry import x` is about names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kernelry."):
            yield node.module.removeprefix("kernelry.")
        if isinstance(node, ast.Import):
            yield from (name.name.removeprefix("kernelry.") for name in node.names if name.name.startswith("kernelry."))


def test_plugins_and_examples_import_public_modules_only():
    found = {str(path.relative_to(ROOT)): {*_imports(text_of(path))} - PUBLIC for path in IMPORTING}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_pages_import_public_modules_only():
    blocks = [
        (path.name, block)
        for path in PROSE
        if path.suffix == ".md"
        for block in re.findall(r"```python\n(.*?)```", text_of(path), re.DOTALL)
    ]
    assert len(blocks) > 5
    assert [(page, module) for page, block in blocks for module in _imports(block) if module not in PUBLIC] == []
