"""A program proves which kernel it holds."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import kernelry
from kernelry import masks
from kernelry.errors import NoKernelError, PluginError
from kernelry.kernel.proof import missing
from kernelry.plugin import KernelSpec

pytestmark = pytest.mark.versions

ARRAY = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)
DENSE = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
IMPOSTOR = KernelSpec(
    name="impostor",
    capabilities=DENSE.capabilities,
    load=DENSE.body,
    signature=lambda _: ("kernelry.impostor",),
)


def attend(query):
    return kernelry.attention(query, query, query, mask=masks.Causal())


def gradient(query):
    return jax.grad(lambda q: attend(q).sum())(query)


def nested(query):
    return jax.jit(attend)(jax.checkpoint(attend)(query))


def lowered(function, kernel, kernels=()):
    with kernelry.use(kernel, kernels=kernels), kernelry.record() as resolutions:
        program = jax.jit(function).lower(ARRAY)
    return resolutions[0], program


@pytest.mark.parametrize("function", [attend, gradient, nested])
@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_lowered_and_compiled_programs_hold_their_kernel(kernel, function):
    resolution, program = lowered(function, kernel)
    resolution.verify(program)
    resolution.verify(program.compile())


@pytest.mark.parametrize("function", [attend, gradient])
def test_a_kernel_that_delegates_is_found_out(function):
    resolution, program = lowered(function, "impostor", (IMPOSTOR,))
    for text in (program, program.compile()):
        with pytest.raises(PluginError, match=r"'kernelry\.impostor', the signature of kernel 'impostor'"):
            resolution.verify(text)


def test_another_kernels_program_is_found_out():
    resolution, _ = lowered(attend, "blockwise")
    with pytest.raises(PluginError, match="another kernel ran"):
        resolution.verify(lowered(attend, "dot_product")[1])


def _sine_in_its_scope(query):
    with jax.named_scope("kernelry.dot_product"):
        return jnp.sin(query)


def _function_of_its_name(query):
    def products(query):
        return query[0, :, 0] @ query[0, :, 0].T

    products.__name__ = "kernelry.dot_product"
    return jax.jit(products)(query)


def _work_elsewhere(query):
    with kernelry.use("blockwise"):
        out = attend(query)
    with jax.named_scope("kernelry.dot_product"):
        return out + 1


@pytest.mark.parametrize("function", [_sine_in_its_scope, _function_of_its_name, _work_elsewhere])
def test_a_name_without_the_work_proves_nothing(function):
    resolution, _ = lowered(attend, "dot_product")
    program = jax.jit(function).lower(ARRAY)
    for text in (program, program.compile()):
        with pytest.raises(PluginError, match="does not contain"):
            resolution.verify(text)


@pytest.mark.parametrize("name", ["kernelry.dot", "ernelry.dot_product", "dot_product", "kernelry.dot_product.more"])
def test_a_part_of_a_name_is_not_the_name(name):
    resolution, program = lowered(attend, "dot_product")
    spec = dataclasses.replace(resolution.plan.kernel, signature=lambda _: (name,))
    changed = dataclasses.replace(resolution, plan=dataclasses.replace(resolution.plan, kernel=spec))
    with pytest.raises(PluginError, match="does not contain"):
        changed.verify(program)


def _hashed_call(query):
    with jax.named_scope("mine"):
        return jax.ffi.ffi_call("mine.forward.0123abcd", jax.ShapeDtypeStruct(query.shape, query.dtype))(query)


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("mine.forward.*", True),
        ("mine.forward.0123abcd*", True),
        ("mine.forward.0123abcd", True),
        ("mine.forward.", False),
        ("mine.backward.*", False),
        ("ine.forward.*", False),
        ("mine.forward.01*cd", False),
        ("*", False),
    ],
)
def test_the_target_of_a_custom_call_may_be_told_by_how_it_begins(part, found):
    program = jax.jit(_hashed_call).trace(ARRAY).lower()
    assert missing((part, "mine"), program) == (() if found else (part, "mine"))


def test_an_empty_signature_proves_nothing():
    resolution, program = lowered(attend, "dot_product")
    spec = dataclasses.replace(resolution.plan.kernel, signature=lambda _: ())
    changed = dataclasses.replace(resolution, plan=dataclasses.replace(resolution.plan, kernel=spec))
    with pytest.raises(PluginError, match="empty signature"):
        changed.verify(program)


def test_nothing_resolved_cannot_be_verified():
    resolution = kernelry.explain(kernelry.Request(q_len=8), kernel="splash")
    with pytest.raises(NoKernelError):
        resolution.verify(lowered(attend, "dot_product")[1])


def test_a_signature_that_is_one_text_is_an_error_though_every_program_has_its_letters():
    spelt = dataclasses.replace(DENSE, name="spelt", signature=lambda _: "scope")
    resolution, program = lowered(attend, "spelt", (spelt,))
    with pytest.raises(PluginError, match="signature must return a tuple of texts, got 'scope'"):
        resolution.verify(program)
