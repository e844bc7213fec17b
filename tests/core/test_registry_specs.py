"""A kernel whose description is wrong is left out, or stays where it can still serve; its fault says what to write."""

import pytest

import kernelry
from kernelry.errors import PluginError
from kernelry.registry.contents import FaultKind

pytestmark = pytest.mark.versions

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
    "dict(load='json:NoSuch')": (
        "its body 'json:NoSuch' cannot be imported: json has no 'NoSuch'",
        "reinstall the distribution; its author: correct load=",
    ),
    "dict(load='faulty_package.kernel:Kernl')": (
        "faulty_package.kernel has no 'Kernl'; did you mean 'Kernel'?",
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
    "declares(manual_axes='checked')": (
        "manual_axes must be a ManualAxes, got 'checked'",
        "write ManualAxes.CHECKED or ManualAxes.UNCHECKED",
    ),
    "declares(partitioned_by_xla='yes')": ("partitioned_by_xla must be True or False, got 'yes'", "write partitioned"),
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
def faulty(shelf, install):
    """Puts a kernel on the shelf whose body, never imported, is in a package that must not be imported."""
    package = shelf.folder / "faulty_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('listing imports no kernel')")
    (package / "kernel.py").write_text("raise AssertionError('listing imports no kernel')\nclass Kernel: ...\n")
    (package / "elsewhere.py").write_text("from faulty_package.kernel import *\n")

    def put(change):
        shelf.put("broken", SPEC.format(change=change))
        return install()

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
    "declares(kv_layouts=frozenset({'value_in_keys'}))": (
        "kv_layouts: 'value_in_keys' is unknown",
        "write 'value_in_key'",
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


@pytest.mark.parametrize("body", ["faulty_package.kernel:Kernel", "faulty_package.elsewhere:Kernel", "math:sin"])
def test_platform_of_another_jax_plugin_and_body_in_a_package_not_imported_are_no_faults(faulty, body):
    change = f"{{**declares(platforms=frozenset({{'metal', 'cpu'}})), 'load': {body!r}}}"
    assert faulty(change).faults == ()
