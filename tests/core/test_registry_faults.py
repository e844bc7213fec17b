"""A broken plugin behind a real entry point is reported with its fix, and everything else works."""

import textwrap

import jax
import pytest

import kernelry
from kernelry import registry
from kernelry.catalogue import FaultKind
from kernelry.errors import KernelRefusedError, PluginError

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
        "the entry point broken = 'broken' names <module 'broken'",
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
        "make the hook's parameters those of kernelry.hookspecs",
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
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\nbroken = {value}\n")
    (fault,) = shelf.build().faults
    assert fault.kind is FaultKind.ENTRY_POINT
    assert fault.detail == f"the entry point broken = {value!r} {detail}"
    assert fault.fix.endswith('name the module with the hooks, e.g. broken = "broken.plugin", and install it again')


SPEC = """
    import dataclasses
    from kernelry.plugin import AtomKind, Dims, Feature, Tolerance, hookimpl
    from kernelry_dot_product.plugin import DOT_PRODUCT

    contract = (1, 1)
    can = DOT_PRODUCT.capabilities

    class Odd:
        def __repr__(self):
            1 / 0

    def declares(**changed):
        return {{"capabilities": dataclasses.replace(can, **changed)}}

    @hookimpl
    def kernelry_kernels():
        return [dataclasses.replace(DOT_PRODUCT, **{{"name": "faulty", **{change}}})]
"""
UNUSABLE = {
    "dict(load='no_such_package.kernel:Kernel')": (
        "its body 'no_such_package.kernel:Kernel' cannot be imported: there is no module 'no_such_package'",
        "reinstall the distribution; its author: correct load=",
    ),
    "dict(load='faulty_package.lost:Kernel')": ("there is no module 'faulty_package.lost'", "correct load="),
    "dict(load='faulty_package.kernel.lost:Kernel')": (
        "there is no module 'faulty_package.kernel.lost'",
        "correct load=",
    ),
    "dict(load='json')": (
        "load must be 'module:attribute' or a function, got 'json'",
        "write load='package.module:attribute'",
    ),
    "dict(load='json:a:b')": ("load must be 'module:attribute' or a function, got 'json:a:b'", "write load='package."),
    "dict(load='json:decoder.JSONDecoder')": (
        "load must be 'module:attribute' or a function, got 'json:d",
        "write load",
    ),
    "dict(name='auto')": ("name must be a text other than 'auto', got 'auto'", "give the kernel another name"),
    "dict(signature='scope')": ("signature must be a function, got 'scope'", "pass a function as signature="),
    "dict(tilings=())": ("tilings must be a function, got ()", "pass a function as tilings="),
    "dict(refusals=None)": ("refusals must be a function, got None", "pass a function as refusals="),
    "dict(capabilities='all')": ("capabilities must be Capabilities, got 'all'", "pass a Capabilities"),
    "declares(dtypes='float32')": (
        "dtypes must be a frozenset of texts, got 'float32'",
        "write dtypes=frozenset({…})",
    ),
    "declares(modes=frozenset({'train'}))": (
        "modes must hold Mode members, got 'train'",
        "write Mode members in modes=",
    ),
    "declares(atoms=frozenset(Feature))": ("atoms must hold AtomKind members, got <Feature.", "write AtomKind members"),
    "declares(gradient='native')": (
        "gradient must be a Gradient, got 'native'",
        "write Gradient.NONE, Gradient.NATIVE",
    ),
    "declares(tolerances=(1,))": ("tolerances must be a tuple of Tolerances, ", "write tolerances=(Tolerance("),
    "declares(tolerances=(Tolerance(32, 1e-6, 1e-5, ''),))": (
        "each a dtype's name and two numbers, got (Tolerance(dtype=32, ",
        "write tolerances=(Tolerance('float32', forward, gradient, reason),)",
    ),
    "declares(minimum_generation='gpu')": (
        "minimum_generation must be a tuple of (platform, generation) pairs, got 'gpu'",
        "write minimum_generation=(('gpu', 80),)",
    ),
    "declares(minimum_generation=('gpu', 80))": ("minimum_generation must be a tuple of (platform, ", "write minimum"),
    "declares(minimum_generation=(('gpu', 'a100'),))": ("minimum_generation must be a tuple of (platf", "write min"),
    "declares(head_dims='64')": ("head_dims must be Dims of integers from 1 on, got '64'", "write head_dims=Dims("),
    "declares(head_dims=Dims(multiple_of=0))": ("head_dims must be Dims of integers from 1 on, got Dims(", "write"),
    "declares(symbolic_sizes='batch')": ("symbolic_sizes must be a frozenset of texts, got 'batch'", "write symbolic"),
    "declares(grouped_heads='no')": ("grouped_heads must be True or False, got 'no'", "write grouped_heads=True"),
    "dict(summary=3)": ("summary must be a text, got 3", "write one line of text as summary="),
    "dict(known_failures=('case',))": (
        "known_failures must be a tuple of (case, reason) pairs, got ('case',)",
        "write known_failures=((case, reason),)",
    ),
    "declares(dtypes=Odd())": ("checking it raised ZeroDivisionError", "write it with the types that KernelSpec names"),
}


@pytest.fixture
def faulty(shelf, installed):
    """Puts a kernel on the shelf whose body, never imported, is in a package that must not be imported."""
    package = shelf.folder / "faulty_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('listing imports no kernel')")
    (package / "kernel.py").write_text("")

    def put(change):
        shelf.put("broken", SPEC.format(change=change))
        return installed()

    return put


@pytest.mark.parametrize(("change", "detail", "fix"), [(key, *said) for key, said in UNUSABLE.items()], ids=UNUSABLE)
def test_kernel_that_cannot_be_used_is_left_out_with_its_fix(faulty, fresh_request, change, detail, fix):
    found = faulty(change)
    fault = found.faults[0]
    assert (fault.kind, fault.distribution) == (FaultKind.WRONG_SPEC, "broken 1.0")
    assert detail in fault.detail
    assert fix in fault.fix
    assert list(found.kernels) == ["healthy_kernel"]
    [name] = found.unusable
    if name != "auto":
        with pytest.raises(PluginError, match=r"kernel 'faulty' of broken 1\.0 was left out: "):
            kernelry.resolve(fresh_request, kernel="faulty")


UNKNOWN_WORDS = {
    "declares(dtypes=frozenset({'fp32', 'float32'}))": ("dtypes: 'fp32' is unknown", "write 'float32'"),
    "declares(dtypes=frozenset({'half'}))": ("dtypes: 'half' is unknown", "write 'float16'"),
    "declares(dtypes=frozenset({'bfloat61'}))": ("dtypes: 'bfloat61' is unknown", "write 'bfloat16'"),
    "declares(tolerances=(dataclasses.replace(can.tolerances[0], dtype='bf16'),))": (
        "dtypes: 'bf16' is unknown",
        "write 'bfloat16'",
    ),
    "declares(platforms=frozenset({'cuda'}))": ("platforms: 'cuda' is unknown", "write 'gpu'"),
    "declares(platforms=frozenset({'h100'}))": ("platforms: 'h100' is unknown", "write 'gpu'"),
    "declares(platforms=frozenset({'TPU'}))": ("platforms: 'TPU' is unknown", "write 'tpu'"),
    "declares(minimum_generation=(('nvidia', 80),))": ("platforms: 'nvidia' is unknown", "write 'gpu'"),
    "declares(kv_quantizations=frozenset({'int8'}))": (
        "kv_quantizations: 'int8' is unknown",
        "write one of float8_e4m3fn:head_dim, ",
    ),
    "declares(symbolic_sizes=frozenset({'q_length'}))": ("symbolic_sizes: 'q_length' is unknown", "write 'q_len'"),
    "declares(context_parallel=frozenset({'rings'}))": ("context_parallel: 'rings' is unknown", "write 'ring'"),
}


@pytest.mark.parametrize(
    ("change", "detail", "fix"), [(key, *said) for key, said in UNKNOWN_WORDS.items()], ids=UNKNOWN_WORDS
)
def test_word_that_no_request_has_is_reported_and_the_kernel_stays(faulty, change, detail, fix):
    found = faulty(change)
    (fault,) = found.faults
    assert fault.kind is FaultKind.DECLARATION
    assert fault.detail == f"kernel 'faulty': {detail}, so no request has it"
    assert fault.fix.startswith(fix)
    assert fault.fix.endswith("or report it to the authors of broken 1.0")
    assert list(found.kernels) == ["faulty", "healthy_kernel"]


UNDECLARED = {
    "platforms=frozenset(), interpret=False": ("platforms", "write platforms=frozenset({'gpu'})"),
    "modes=frozenset()": ("modes", "write modes=frozenset(Mode)"),
    "dtypes=()": ("dtypes", "write dtypes=frozenset({'bfloat16', 'float32'})"),
    "head_dims=None": ("head_dims", "write head_dims=Dims()"),
    "normalizations=frozenset()": ("normalizations", "write normalizations=frozenset({'softmax'})"),
}


@pytest.mark.parametrize(("change", "name", "fix"), [(key, *said) for key, said in UNDECLARED.items()], ids=UNDECLARED)
def test_kernel_that_no_request_reaches_is_reported_and_stays(faulty, change, name, fix):
    found = faulty(f"declares({change})")
    (fault,) = found.faults
    assert fault.kind is FaultKind.DECLARATION
    assert fault.detail == f"kernel 'faulty': it declares no {name}, so no request reaches it"
    assert fault.fix.startswith(fix)
    assert list(found.kernels) == ["faulty", "healthy_kernel"]


def test_kernel_for_interpret_mode_alone_needs_no_platform(faulty):
    assert faulty("declares(platforms=frozenset(), interpret=True)").faults == ()


def test_platform_of_another_jax_plugin_and_body_in_a_package_not_imported_are_no_faults(faulty):
    change = "{**declares(platforms=frozenset({'metal', 'cpu'})), 'load': 'faulty_package.kernel:Kernel'}"
    assert faulty(change).faults == ()


def test_distribution_without_metadata_is_loaded_as_unknown(shelf):
    info = shelf.put_kernel("orphan", "orphan_kernel")
    points = shelf.points()
    (info / "METADATA").unlink()
    found = registry.build(points)
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
def vendored(shelf, installed):
    shelf.put("vendored", VENDOR)
    (shelf.folder / "vendored_body.py").write_text("import no_such_vendor")
    return installed()


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
