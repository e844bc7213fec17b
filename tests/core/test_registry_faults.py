"""A broken plugin behind a real entry point is reported with its fix, and everything else works."""

import textwrap

import jax
import pytest

import kernelry
from kernelry.errors import KernelRefusedError, PluginError
from kernelry.registry import discovery
from kernelry.registry.contents import FaultKind

pytestmark = pytest.mark.versions


def _hook(body, name="kernelry_kernels", parameters=""):
    return f"""
    from kernelry.plugin import hookimpl
    contract = (1, 1)

    @hookimpl
    def {name}({parameters}):
        {body}
    """


BROKEN = {
    "import_error": (
        "1 / 0",
        FaultKind.IMPORT_ERROR,
        "importing broken raised ZeroDivisionError",
        "reinstall or upgrade",
    ),
    "exit_on_import": ("raise SystemExit(3)", FaultKind.IMPORT_ERROR, "raised SystemExit", "reinstall or upgrade"),
    "missing_vendor": (
        "import no_such_vendor",
        FaultKind.IMPORT_ERROR,
        "No module named 'no_such_vendor'",
        "reinstall",
    ),
    "lazy_attributes": (
        "def __getattr__(name):\n        import no_such_vendor",
        FaultKind.IMPORT_ERROR,
        "No module named 'no_such_vendor'",
        "reinstall or upgrade",
    ),
    "contract_missing": (
        _hook("return []").replace("contract = (1, 1)", ""),
        FaultKind.CONTRACT,
        "got None",
        "add contract = (1, 1) to the plugin, or upgrade broken",
    ),
    "contract_no_pair": ("contract = 1", FaultKind.CONTRACT, "got 1", "add contract = (1, 1)"),
    "contract_too_old": ("contract = (0, 0)", FaultKind.CONTRACT, "contract 0 … 0, this core has 1", "upgrade broken"),
    "contract_too_new": (
        "contract = (2, 3)",
        FaultKind.CONTRACT,
        "contract 2 … 3, this core has 1",
        "upgrade kernelry",
    ),
    "hook_raises": (_hook("1 / 0"), FaultKind.HOOK_RAISED, "kernelry_kernels raised ZeroDivisionError", "report it to"),
    "hook_exits": (_hook("raise SystemExit"), FaultKind.HOOK_RAISED, "kernelry_kernels raised SystemExit", "report it"),
    "masks_hook_raises": (
        _hook("1 / 0", "kernelry_masks"),
        FaultKind.HOOK_RAISED,
        "kernelry_masks raised ZeroDivisionError",
        "report it to the authors",
    ),
    "returns_no_list": (
        _hook("return 7"),
        FaultKind.WRONG_RETURN,
        "must return a list of KernelSpec, got 7",
        "upgrade",
    ),
    "returns_no_specs": (
        _hook("return ['x']"),
        FaultKind.WRONG_RETURN,
        "list of KernelSpec, and item 0 is not one, got 'x'",
        "upgrade",
    ),
    "returns_no_masks": (
        _hook("return {'x': 7}", "kernelry_masks"),
        FaultKind.WRONG_RETURN,
        "kernelry_masks must return a mapping of names to Mask classes, got {'x': 7}",
        "upgrade",
    ),
    "returns_unnamed_masks": (
        _hook("from kernelry.masks import Causal; return {1: Causal}", "kernelry_masks"),
        FaultKind.WRONG_RETURN,
        "kernelry_masks must return a mapping of names to Mask classes",
        "upgrade",
    ),
    "returns_no_normalizations": (
        _hook("return ['x']", "kernelry_normalizations"),
        FaultKind.WRONG_RETURN,
        "kernelry_normalizations must return a mapping of names to Normalizations, got ['x']",
        "upgrade",
    ),
    "returns_unhashable_specs": (
        _hook(
            "from kernelry.plugin import Capabilities, KernelSpec; "
            "return [KernelSpec(name='k', capabilities=Capabilities(platforms={'cpu'}), load='a:b', signature=str)]"
        ),
        FaultKind.WRONG_RETURN,
        "got \"'k': unhashable type: 'set'\"",
        "upgrade",
    ),
    "returns_one_spec": (
        _hook("from kernelry_dot_product.plugin import BLOCKWISE; return BLOCKWISE"),
        FaultKind.WRONG_RETURN,
        "kernelry_kernels must return a list of KernelSpec, got the KernelSpec 'blockwise'",
        "write return [spec] with the one spec in a list, or upgrade broken 1.0",
    ),
    "returns_a_generator": (_hook("yield 7"), FaultKind.WRONG_RETURN, "got <generator object", "upgrade"),
    "is_no_plugin": (
        "",
        FaultKind.ENTRY_POINT,
        "the entry point broken = 'broken' names the module 'broken', which has neither a contract nor hooks",
        "under [project.entry-points.'kernelry.plugins'] of broken, name the module with the hooks, e.g. broken = ",
    ),
    "hook_misspelt": (
        _hook("return []", "kernelry_kernel"),
        FaultKind.UNKNOWN_HOOK,
        "there is no hook 'kernelry_kernel'; did you mean 'kernelry_kernels'?",
        "rename the function",
    ),
    "hook_unmarked": (
        "contract = (1, 1)\ndef kernelry_kernels():\n    return []",
        FaultKind.UNMARKED_HOOK,
        "kernelry_kernels is not marked as a hook",
        "decorate it with @kernelry.plugin.hookimpl",
    ),
    "hook_signature": (
        _hook("return []", parameters="device"),
        FaultKind.HOOK_SIGNATURE,
        "'device'",
        "make the hook's parameters those of kernelry.registry.hooks",
    ),
    "hook_wrapper": (
        _hook("return (yield)").replace("@hookimpl", "@hookimpl(wrapper=True)"),
        FaultKind.HOOK_SIGNATURE,
        "kernelry_kernels is a hook wrapper",
        "make it a plain hookimpl",
    ),
}


@pytest.mark.parametrize(("source", "kind", "detail", "fix"), BROKEN.values(), ids=BROKEN)
def test_fault_names_distribution_version_fault_and_fix(shelf, source, kind, detail, fix):
    shelf.put("broken", source)
    (fault,) = shelf.build().faults
    assert (fault.kind, fault.plugin, fault.distribution) == (kind, "broken", "broken 1.0")
    assert detail in fault.detail
    assert fix in fault.fix


@pytest.mark.parametrize("source", [source for source, *_ in BROKEN.values()], ids=BROKEN)
def test_broken_plugin_leaves_the_others_alone(shelf, source):
    shelf.put("broken", source)
    assert list(shelf.build().kernels) == ["healthy_kernel"]


def test_fault_reads_as_one_line(shelf):
    shelf.put("broken", "contract = (0, 0)")
    assert str(shelf.build().faults[0]) == (
        "broken [broken 1.0]: unsupported contract: it was written for contract 0 … 0, this core has 1; "
        "pip install --upgrade broken"
    )


def test_healthy_plugins_have_no_faults(shelf):
    assert shelf.build().faults == ()


def test_misspelt_hook_leaves_the_plugins_other_hooks_alone(shelf):
    extra = "\n    @hookimpl\n    def kernelry_mask():\n        return {}\n"
    shelf.put_kernel("broken", "second_kernel", extra=extra)
    assert list(shelf.build().kernels) == ["healthy_kernel", "second_kernel"]


def test_wrong_signature_excludes_the_whole_plugin(shelf):
    extra = "\n    @hookimpl\n    def kernelry_rank(device):\n        return None\n"
    shelf.put_kernel("broken", "second_kernel", extra=extra)
    assert list(shelf.build().kernels) == ["healthy_kernel"]


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("not a module!", "is not of the form package.module or package.module:attribute"),
        ("brokn", "names a module, and there is no 'brokn'"),
        ("broken.plugin", "names a module, and there is no 'broken.plugin'"),
        ("broken:plugn", "names 'plugn', which broken does not have; did you mean 'plugin'?"),
        ("broken:plugin", "names 7, which has neither a contract nor hooks"),
        ("broken:kernelry_kernels", "names a function; name its module, 'broken'"),
    ],
)
def test_wrong_entry_point_says_what_to_change(shelf, value, detail):
    info = shelf.put("broken", f"plugin = 7\n{textwrap.dedent(_hook('return []'))}")
    (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\nbroken = {value}\n")
    (fault,) = shelf.build().faults
    assert fault.kind is FaultKind.ENTRY_POINT
    assert fault.detail == f"the entry point broken = {value!r} {detail}"
    assert fault.fix.endswith('name the module with the hooks, e.g. broken = "broken.plugin", and install it again')


def test_distribution_without_metadata_is_loaded_as_unknown(shelf):
    info = shelf.put_kernel("orphan", "orphan_kernel")
    points = shelf.points()
    (info / "METADATA").unlink()
    found = discovery.build(points)
    assert found.kernels["orphan_kernel"].distribution == "unknown distribution"


# Kernels whose vendor is missing.

VENDOR = """
    import dataclasses
    from kernelry.plugin import Refusal, RefusalCode, hookimpl
    from kernelry_dot_product.plugin import DOT_PRODUCT

    contract = (1, 1)

    def refusals(request, environment):
        if not environment.vendor("no-such-vendor").missing:
            return ()
        remedy = "pip install 'vendored[vendor]'"
        return (Refusal(RefusalCode.VENDOR_MISSING, "no-such-vendor is not installed", remedy),)

    @hookimpl
    def kernelry_kernels():
        body = "vendored_body:Kernel"
        return [
            dataclasses.replace(DOT_PRODUCT, name="honest", load=body, refusals=refusals),
            dataclasses.replace(DOT_PRODUCT, name="hopeful", load=body),
        ]
"""


@pytest.fixture
def vendored(shelf, install):
    shelf.put("vendored", VENDOR)
    (shelf.folder / "vendored_body.py").write_text("from no_such_vendor import Kernel")
    return install()


def test_missing_vendor_does_not_keep_a_kernel_from_the_list(vendored):
    assert list(vendored.kernels) == ["healthy_kernel", "honest", "hopeful"]


def test_missing_vendor_is_a_refusal_with_the_remedy(vendored, fresh_request):
    message = r"no-such-vendor is not installed; pip install 'vendored\[vendor\]'"
    with pytest.raises(KernelRefusedError, match=message):
        kernelry.resolve(fresh_request, kernel="honest")


def test_missing_vendor_leaves_auto_alone(vendored, fresh_request):
    assert kernelry.resolve(fresh_request).kernel == "healthy_kernel"


def test_body_that_cannot_be_imported_raises_when_chosen(vendored):
    array = jax.numpy.ones((1, 3, 1, 5))
    with pytest.raises(PluginError, match=r"'hopeful': cannot load its body 'vendored_body:Kernel': .*no_such_vendor"):
        kernelry.attention(array, array, array, kernel="hopeful")
