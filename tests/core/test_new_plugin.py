"""What `kernelry new-plugin` writes, and what kernelry says to the mistakes that authors make in it.

tests/install installs such a plugin for real and follows docs/writing-a-kernel.md.
"""

import ast
import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

import importlib_metadata
import numpy as np
import pytest
import walk_through
from packaging.requirements import Requirement

import kernelry
from kernelry import _version, cli, masks
from kernelry.cli import new_plugin
from kernelry.errors import ArgumentError, PluginError
from kernelry.kernel import spec
from kernelry.registry import discovery, installed
from kernelry.registry.contents import FaultKind
from kernelry.registry.entry_points import is_ours
from kernelry.registry.hooks import CONTRACT
from kernelry.testing import conformance, reference_attention

PAGE = (Path(__file__).parents[2] / "docs" / "writing-a-kernel.md").read_text()
FILES = [
    ".github/workflows/test.yml",
    "README.md",
    "pyproject.toml",
    "src/kernelry_mine/__init__.py",
    "src/kernelry_mine/kernel.py",
    "src/kernelry_mine/plugin.py",
    "src/kernelry_mine/py.typed",
    "tests/test_kernel.py",
]


def _run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["kernelry", "new-plugin", *map(str, arguments)])
    status = cli.main()
    return status, capsys.readouterr()


# What is written.


def test_every_file_is_written_and_listed(monkeypatch, capsys, tmp_path):
    status, printed = _run(monkeypatch, capsys, "mine", "--into", tmp_path, "--json")
    assert (status, printed.err) == (0, "")
    data = json.loads(printed.out)
    assert sorted(data.pop("files")) == FILES
    found = sorted(path.relative_to(tmp_path / "mine").as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == FILES
    assert data.pop("next") == [
        f"pip install {tmp_path}/mine",
        "kernelry conformance mine",
        f"pip install pytest && pytest {tmp_path}/mine",
    ]
    assert data == {
        "folder": f"{tmp_path}/mine",
        "distribution": "kernelry-mine",
        "plugin": "mine",
        "kernel": "mine",
    }


def test_what_to_do_next_is_printed_as_it_is_to_be_typed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "20")
    _, printed = _run(monkeypatch, capsys, "mine", "--into", "some where")
    assert "\n  pip install './some where/mine'\n  kernelry conformance mine\n" in printed.out
    assert printed.out.endswith("\n  pip install './some where/mine' --no-build-isolation\n")
    assert (tmp_path / "some where" / "mine" / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("given", "distribution", "package", "kernel", "body"),
    [
        ("flash-mini", "kernelry-flash-mini", "kernelry_flash_mini", "flash_mini", "FlashMiniKernel"),
        ("flash_mini", "kernelry-flash-mini", "kernelry_flash_mini", "flash_mini", "FlashMiniKernel"),
        ("kernelry-flash-mini", "kernelry-flash-mini", "kernelry_flash_mini", "flash_mini", "FlashMiniKernel"),
        ("kernelry_v2", "kernelry-v2", "kernelry_v2", "v2", "V2Kernel"),
        ("class", "kernelry-class", "kernelry_class", "class", "ClassKernel"),
    ],
)
def test_one_name_gives_all_the_others(given, distribution, package, kernel, body):
    names = new_plugin.Names.of(given)
    assert (names.distribution, names.package, names.kernel, names.body) == (distribution, package, kernel, body)
    assert names.folder == given


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("Mine", "write e.g. mine."),
        ("3d kernel!", "write e.g. d-kernel."),
        ("a--b", "write e.g. a-b."),
        ("../up", "write e.g. up."),
        ("", "a letter first."),
        ("kernelry-", "a letter first."),
        ("x" * 41, f"write e.g. {'x' * 40}."),
        ("auto", "'auto' means something else in kernelry; give another name."),
    ],
)
def test_what_is_no_name_is_an_error_that_gives_one(monkeypatch, capsys, tmp_path, given, told):
    monkeypatch.chdir(tmp_path)
    status, printed = _run(monkeypatch, capsys, "--", given)
    assert status == 2
    assert printed.err.rstrip().endswith(told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dot-product", "'dot_product' is taken: a plugin of that name is installed, from kernelry-dot-product "),
        ("blockwise", "'blockwise' is taken: a kernel of that name is installed, from kernelry-dot-product "),
        ("pytest", "'pytest' is taken: a package kernelry_pytest is installed. Give another name, e.g. my-pytest."),
    ],
)
def test_a_name_that_is_taken_is_an_error_that_gives_another(monkeypatch, capsys, tmp_path, name, told):
    status, printed = _run(monkeypatch, capsys, name, "--into", tmp_path)
    assert status == 2
    assert told in printed.err
    assert f"e.g. my-{name}" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_of_this_project_that_is_not_installed_keeps_its_name(monkeypatch):
    nothing = discovery.build([])
    monkeypatch.setattr(installed, "registry", lambda: nothing)
    assert [*new_plugin.Names.of("pallas-flash").clashes()] == ["it is a name of kernelry-gpu-pallas"]


def test_nothing_is_overwritten(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    status, printed = _run(monkeypatch, capsys, "mine", "--into", tmp_path)
    assert status == 2
    assert f"{tmp_path}/mine exists, and nothing is overwritten: delete it, give another name, or" in printed.err
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    status, printed = _run(monkeypatch, capsys, "mine", "--into", tmp_path / "file" / "below")
    assert status == 2
    assert f"cannot write {tmp_path}/file" in printed.err


@pytest.mark.parametrize("name", ["a", "mine", "x" * 40])
def test_the_files_compile_and_have_short_lines(name):
    texts = new_plugin.Names.of(name).texts()
    for path, text in texts.items():
        assert "$" not in text.replace("${{ matrix.python }}", ""), path
        if path.endswith(".py"):
            ast.parse(text)
            assert max(map(len, text.splitlines())) <= 88 or len(name) == 40, path


def test_the_manifest_asks_for_this_core_and_its_contract():
    texts = new_plugin.Names.of("mine").texts()
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    (need,) = map(Requirement, project["dependencies"])
    assert need.name == "kernelry"
    assert _version.__version__ in need.specifier
    assert f"contract = ({CONTRACT}, {CONTRACT})" in texts["src/kernelry_mine/plugin.py"]


# What was written works; installing it is simulated by a folder on sys.path.


class Author:
    """A plugin as it was generated, in a folder, in which mistakes can be made."""

    def __init__(self, folder):
        self.folder = folder
        for path, text in new_plugin.Names.of("mine").texts().items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)

    def edit(self, path, old, new):
        text = (self.folder / path).read_text()
        assert text.count(old) == 1, (path, old)
        (self.folder / path).write_text(text.replace(old, new))

    def install(self):
        """Writes the metadata as a build does, and finds the plugin next to kernelry-dot-product."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]
        info = self.folder / "src" / "kernelry_mine-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
        groups = project["entry-points"].items()
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
        (info / "entry_points.txt").write_text("\n".join(lines))
        importlib.invalidate_caches()
        points = [
            point
            for point in importlib_metadata.entry_points()
            if point.dist.name in ("kernelry-mine", "kernelry-dot-product") and is_ours(point.group)
        ]
        return discovery.build(points)


@pytest.fixture
def author(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    spec._loaded.cache_clear()  # of a spec that is equal
    yield Author(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "kernelry_mine"]:
        del sys.modules[name]


@pytest.fixture
def install(author, monkeypatch):
    def put():
        found = author.install()
        monkeypatch.setattr(installed, "registry", lambda: found)
        return found

    return put


def _qkv(q_len=6, heads=(4, 2), dim=8):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((2, q_len, count, dim), np.float32) for count in (heads[0], heads[1], heads[1]))


MASKS = [masks.Full(), masks.Causal(), masks.Causal() & masks.Segments(np.array([[0, 0, 1, 1, 1, -1]] * 2))]


@pytest.mark.parametrize("mask", MASKS, ids=["full", "causal", "packed"])
def test_the_kernel_equals_the_reference(install, mask):
    assert install().faults == ()
    part = kernelry.attention(*_qkv(), mask=mask, kernel="mine", return_partial=True)
    expected = reference_attention(*_qkv(), mask=mask)
    np.testing.assert_allclose(part.out, expected.out, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(part.lse, expected.lse, rtol=2e-5, atol=2e-6)


def test_its_test_runs_cases_of_the_kit(author, install, monkeypatch):
    install()
    names = {"__name__": "test_kernel"}
    exec((author.folder / "tests" / "test_kernel.py").read_text(), names)
    (mark,) = names["test_conformance"].pytestmark
    cases = {str(case): case for case in mark.args[1]}
    assert len(cases) > 50
    names["test_conformance"](cases["mine: full attention"])
    names["test_a_call_that_names_it_gets_it"]()


def test_a_case_that_fails_fails_its_test(author, install):
    seen = "logits = jnp.where(mask.evaluate(queries, keys), logits, -jnp.inf)"
    author.edit("src/kernelry_mine/kernel.py", seen, "pass")
    install()
    (case,) = [case for case in conformance.assignments("mine", quick=True) if case.case.name == "causal"]
    with pytest.raises(AssertionError, match="failed: "):
        case.test()


def test_installing_it_again_under_its_name_is_an_error(author, install):
    install()
    told = [*new_plugin.Names.of("kernelry-mine").clashes()]
    assert told[0] == "a plugin of that name is installed, from kernelry-mine 0.1.0"


# Six mistakes. Each returns what kernelry says, as the page shows it.


def _fault(found, kind):
    (fault,) = [fault for fault in found.faults if fault.plugin == "mine"]
    assert fault.kind is kind
    assert "blockwise" in found.kernels  # the others are left alone
    return str(fault)


def _raised(**options):
    with pytest.raises(PluginError) as raised:
        kernelry.attention(*_qkv(), kernel="mine", **options)
    assert kernelry.attention(*_qkv()).shape == (2, 6, 4, 8)
    return str(raised.value)


def _wrong_entry_point(author, install):
    author.edit("pyproject.toml", '"kernelry_mine.plugin"', '"kernelry_mine"')
    return _fault(install(), FaultKind.ENTRY_POINT)


def _wrong_group(author, install):
    author.edit("pyproject.toml", '"kernelry.plugins"', '"kernelry.plugin"')
    return _fault(install(), FaultKind.ENTRY_POINT)


def _misspelt_hook(author, install):
    author.edit("src/kernelry_mine/plugin.py", "def kernelry_kernels", "def kernelry_kernel")
    return _fault(install(), FaultKind.UNKNOWN_HOOK)


def _missing_capability(author, install):
    author.edit("src/kernelry_mine/plugin.py", '        normalizations=frozenset({"softmax"}),\n', "")
    return _fault(install(), FaultKind.DECLARATION)


RETURN = "return Partial(out, lse=lse if statistics else None, dtype=request.dtype)"


def _wrong_return_type(author, install):
    author.edit("src/kernelry_mine/kernel.py", RETURN, "return out")
    install()
    return _raised()


def _forgotten_lse(author, install):
    author.edit("src/kernelry_mine/kernel.py", RETURN, "return Partial(out, dtype=request.dtype)")
    install()
    return _raised(return_partial=True)


def _name_clash(author, install):
    author.edit("src/kernelry_mine/plugin.py", 'name="mine"', 'name="dot_product"')
    return _fault(install(), FaultKind.DUPLICATE_KERNEL)


MISTAKES = {
    "wrong entry point": _wrong_entry_point,
    "wrong group of entry points": _wrong_group,
    "misspelt hook": _misspelt_hook,
    "missing capability": _missing_capability,
    "wrong return type": _wrong_return_type,
    "forgotten lse": _forgotten_lse,
    "name clash": _name_clash,
}
TABLE = dict(re.findall(r"^\| ([a-z ]+) \| [^|]+ \| `([^|]+)` \|$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_as_the_page_shows(author, install, mistake):
    told = re.sub(r"0\.1\.0", "…", MISTAKES[mistake](author, install))
    told = re.sub(r"asked for platform=.*?mask=\S+", "asked for …", told)
    assert TABLE[mistake] == told


def test_the_page_shows_every_mistake():
    assert set(TABLE) == set(MISTAKES)


@pytest.mark.parametrize(("mistake", "claim"), [("wrong return type", "output"), ("forgotten lse", "statistics")])
def test_the_kit_finds_what_a_body_returns_wrongly(author, install, mistake, claim):
    MISTAKES[mistake](author, install)
    case = next(each for each in conformance.assignments("mine", quick=True) if each.case.claim == claim)
    result = case.run()
    assert result.outcome.is_bad
    assert "PluginError: kernel 'mine' (kernelry_mine.kernel.MineKernel) returned a wrong result" in result.detail


def test_a_hook_without_the_prefix_is_a_fault(author, install):
    author.edit("src/kernelry_mine/plugin.py", "def kernelry_kernels", "def kernels")
    assert "there is no hook 'kernels'" in _fault(install(), FaultKind.UNKNOWN_HOOK)


def test_one_spec_without_a_list_is_a_fault(author, install):
    author.edit("src/kernelry_mine/plugin.py", "return [SPEC]", "return SPEC")
    assert "write return [spec] with the one spec in a list" in _fault(install(), FaultKind.WRONG_RETURN)


def test_a_body_without_forward_is_named(author, install):
    author.edit("src/kernelry_mine/kernel.py", "def forward(", "def foward(")
    install()
    assert "kernel 'mine': cannot load its body 'kernelry_mine.kernel:MineKernel': TypeError" in _raised()


def test_a_dtype_that_is_not_given_says_what_to_pass(author, install):
    author.edit("src/kernelry_mine/kernel.py", ", dtype=request.dtype)", ")")
    install()
    query = np.zeros((1, 4, 2, 8), "bfloat16")
    with pytest.raises(PluginError, match=r"expected the query's 'bfloat16': pass dtype=request\.dtype"):
        kernelry.attention(query, query, query, kernel="mine")


@pytest.mark.parametrize("mistake", ["wrong entry point", "wrong group of entry points", "misspelt hook"])
def test_the_kit_of_a_kernel_that_is_not_found_says_why(author, install, mistake):
    told = MISTAKES[mistake](author, install)
    with pytest.raises(ArgumentError, match="no installed kernel is named 'mine'") as raised:
        conformance.installed_spec("mine")
    assert f"What is wrong with the installed plugins:\n  plugin {told}" in str(raised.value)


def test_the_kit_of_a_contested_kernel_says_who_claims_it(author, install):
    _name_clash(author, install)
    with pytest.raises(PluginError, match=r"claimed by kernelry-dot-product .* and kernelry-mine"):
        conformance.installed_spec("dot_product")


@pytest.mark.parametrize("group", ["kernelry.plugin", "kernelry_plugins", "kernely.plugins", "kernelry.kernels"])
def test_groups_that_were_meant_to_be_that_of_plugins_are_noticed(group):
    assert is_ours(group)


@pytest.mark.parametrize("group", ["console_scripts", "kedro.plugins", "kernelry_mine.extras", "kernel.plugins"])
def test_groups_of_others_are_left_alone(group):
    assert not is_ours(group)


# The page.


def test_the_page_can_be_followed():
    steps = walk_through.steps_of(PAGE)
    commands = [command for step in steps if step.language == "console" for command, _ in step.commands]
    assert commands[:3] == ["kernelry new-plugin mine", "pip install -e ./mine", "kernelry conformance mine"]
    blocks = re.findall(r"^```(\w+)", PAGE, re.MULTILINE)
    assert len(blocks) - blocks.count("text") == len(steps)  # every block but the log is a step


def test_the_page_shows_what_is_generated():
    texts = new_plugin.Names.of("mine").texts()
    shown = {step.title: step.text for step in walk_through.steps_of(PAGE) if walk_through.GENERATED in step.title}
    assert len(shown) == 2
    for title, text in shown.items():
        assert text == texts[title.removeprefix("mine/").removesuffix(walk_through.GENERATED)]


def test_an_edit_needs_the_lines_that_it_changes():
    assert walk_through.patched("a\nb\nc\n", " a\n-b\n+d\n") == "a\nd\nc\n"
    with pytest.raises(AssertionError):
        walk_through.patched("a\nb\n", "-x\n+y\n")


def test_output_that_is_not_shown_fails():
    walk_through.check_printed("one\n…\nthree … five\n", "│ one │\n two\nthree\nfour five")
    with pytest.raises(AssertionError, match="the page shows"):
        walk_through.check_printed("one\nthree\n", "one\ntwo\nthree\n")
