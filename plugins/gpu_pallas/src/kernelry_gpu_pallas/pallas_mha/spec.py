"""What `pallas_mha` declares."""

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
    ManualAxes,
    Mode,
    Operand,
    Refusal,
    RefusalCode,
    Request,
    Statistic,
    Tiling,
    signature_of,
    standard_tolerances,
    uneven_lengths,
)
from kernelry_gpu_pallas.blocks import SMALLEST_BLOCK, power_of_two

_BLOCKS = ((128, 32), (64, 32), (128, 64), (64, 64), (32, 32))
"""Elements; (forward, backward) block sizes of the search space. The first is the vendor's default."""

_FORWARD_BYTES = 32768
"""Bytes of a forward block; beyond that the Triton compiler runs out of shared memory, on A100 and on
H100 (XLA of jax 0.12; e.g. 128 rows of 128 float32: 262144 of 232448 bytes requested on H100)."""

_BACKWARD_BYTES = 16384
"""Bytes of a backward block above 32 rows that the same compilers were seen to accept."""

_SMALL_BACKWARD = 32
"""Elements; the backward block that they accept at every head dim declared."""

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*uneven_lengths(request, SMALLEST_BLOCK, alike=True), *_many_segments(request))


def _many_segments(request: Request) -> Iterator[Refusal]:
    found = sum(atom.kind is AtomKind.SEGMENTS for atom in request.mask.atoms)
    if found > 1:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={request.mask} has {found} arrays of ids")


def _tilings(request: Request) -> tuple[Tiling, ...]:
    return tuple(dict.fromkeys(_tiling(request, *blocks) for blocks in _BLOCKS))


def _tiling(request: Request, forward: int, backward: int) -> Tiling:
    # The vendor pads the head dim to a power of two. Triton's blocks are powers of two as well:
    # length & −length is the largest one that divides the length.
    row = power_of_two(request.head_dim) * _ITEM_BYTES[request.dtype]
    largest = request.q_len & -request.q_len
    forward = min(forward, _FORWARD_BYTES // row, largest)
    backward = min(backward, max(_SMALL_BACKWARD, _BACKWARD_BYTES // row), largest)
    return Tiling.of(
        block_q=forward,
        block_k=forward,
        block_q_dkv=backward,
        block_kv_dkv=backward,
        block_q_dq=backward,
        block_kv_dq=backward,
    )


PALLAS_MHA = KernelSpec(
    name="pallas_mha",
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        interpret=True,
        minimum_generation=(("gpu", 80),),
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        head_dims=Dims(minimum=16, maximum=256),
        atoms=frozenset({AtomKind.CAUSAL, AtomKind.SEGMENTS}),
        features=frozenset({Feature.SCALE}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        names_residuals=True,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances(
            "float32",
            "bfloat16",
            "float16",
            rounded="probabilities, output and Σ out · d_out",
            note="for logits to 1e3, see the README",
        ),
    ),
    load="kernelry_gpu_pallas.pallas_mha.kernel:PallasMhaKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=signature_of("kernelry.pallas_mha", "__gpu$xla.gpu.triton"),
    summary="JAX's Pallas Triton attention for NVIDIA GPUs; full and causal; lengths in multiples of 16",
)
