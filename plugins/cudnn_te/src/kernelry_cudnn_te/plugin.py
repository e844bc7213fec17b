"""What this plugin registers: `cudnn_jax`, cuDNN's fused attention as JAX calls it."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Environment,
    Feature,
    Gradient,
    KernelSpec,
    Mode,
    Operand,
    Refusal,
    RefusalCode,
    Request,
    Tolerance,
    hookimpl,
)

contract = (1, 1)

_HOPPER = 90
"""Compute capability times ten; from here on jax's check_is_flash_attention allows head dims to 256."""

_HEAD_DIM_BEFORE_HOPPER = 128
"""Elements; the same check's limit on older GPUs."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*_head_dim(request), *_window(request), *_driver(environment))


def _head_dim(request: Request) -> Iterator[Refusal]:
    generation = request.target.generation
    if request.head_dim <= _HEAD_DIM_BEFORE_HOPPER or (generation is not None and generation >= _HOPPER):
        return
    detail = f"head_dim={request.head_dim} > {_HEAD_DIM_BEFORE_HOPPER} on {request.target}"
    remedy = "larger ones need compute capability 9.0; name the device, e.g. gpu:h100"
    yield Refusal(RefusalCode.HEAD_DIM, detail, None if generation else remedy)


def _window(request: Request) -> Iterator[Refusal]:
    for atom in request.mask.atoms:
        if atom.params[1] != 0:
            yield Refusal(RefusalCode.MASK_ATOM, f"{atom} looks right={atom.params[1]} > 0 keys ahead")
    if len(request.mask.atoms) > 1:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={request.mask} is more than one band")


def _driver(environment: Environment) -> Iterator[Refusal]:
    reason = environment.probe(why_not_here)
    if reason is not None:
        remedy = 'install JAX with its CUDA libraries, e.g. pip install "jax[cuda12]", on a machine with an NVIDIA GPU'
        yield Refusal(RefusalCode.DRIVER, reason, remedy)


def why_not_here() -> str | None:
    """Returns what this process lacks to run cuDNN attention; imports the vendor."""
    from kernelry_cudnn_te import _vendor

    return _vendor.why_not_here()


def _signature(request: Request) -> tuple[str, ...]:
    return ("__cudnn$fmhaSoftmax", "kernelry.cudnn_jax")


CUDNN_JAX = KernelSpec(
    name="cudnn_jax",
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        minimum_generation=(("gpu", 80),),
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=Dims(minimum=8, maximum=256, multiple_of=8),
        grouped_heads=True,
        atoms=frozenset({AtomKind.CAUSAL, AtomKind.WINDOW}),
        features=frozenset({Feature.SCALE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.NATIVE,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
        tolerances=(
            Tolerance("bfloat16", 1e-2, 4e-2, "not measured: what dot_product needs at 8 bits of mantissa"),
            Tolerance("float16", 2e-3, 1e-2, "not measured: what dot_product needs at 11 bits of mantissa"),
        ),
    ),
    load="kernelry_cudnn_te.cudnn_jax:CudnnJaxKernel",
    refusals=_refusals,
    signature=_signature,
    summary="cuDNN's fused attention through jax.nn; full, causal and left windows; 16-bit dtypes",
)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [CUDNN_JAX]
