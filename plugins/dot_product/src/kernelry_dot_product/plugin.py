"""What this plugin registers: `dot_product`, dense, and `blockwise`, one block of queries at a time."""

from __future__ import annotations

from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Feature,
    Gradient,
    KernelSpec,
    Mode,
    Operand,
    PositionKind,
    Request,
    Statistic,
    Tiling,
    Tolerance,
    hookimpl,
)

contract = (1, 1)

_TOLERANCES = (
    Tolerance("float32", 2e-6, 2e-5, "float32 products and sums"),
    Tolerance("bfloat16", 1e-2, 4e-2, "inputs, probabilities and output are rounded to 8 bits of mantissa"),
    Tolerance("float16", 2e-3, 1e-2, "inputs, probabilities and output are rounded to 11 bits of mantissa"),
)
_EVERYWHERE = Capabilities(
    platforms=frozenset({"cpu", "gpu", "tpu"}),
    interpret=True,
    modes=frozenset(Mode),
    dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
    head_dims=Dims(),
    split_head_dim=True,
    grouped_heads=True,
    unequal_lengths=True,
    empty_arrays=True,
    atoms=frozenset(AtomKind),
    positions=frozenset(PositionKind),
    features=frozenset(Feature),
    statistics=frozenset({Statistic.LSE}),
    normalizations=frozenset({"softmax", "softmax_max_sum"}),
    gradient=Gradient.NATIVE,
    gradients=frozenset(Operand),
    lse_cotangent=True,
    empty_rows=True,
    clean_hidden_slots=True,
    tolerances=_TOLERANCES,
)
_BLOCKS_Q = (64, 128, 256, 512)
"""Query slots. Under a window the block nearest above it wins: benchmarks/blockwise.py."""

_UNBOUNDED_BLOCK_Q = 256
"""Query slots, where a row may see any distance: benchmarks/blockwise.py."""


def _dot_product_signature(request: Request) -> tuple[str, ...]:
    return ("kernelry.dot_product",)


DOT_PRODUCT = KernelSpec(
    name="dot_product",
    capabilities=_EVERYWHERE,
    load="kernelry_dot_product.dot_product:DotProductKernel",
    signature=_dot_product_signature,
    summary="dense attention in plain XLA; every feature, every platform; memory O(T·S)",
)


def _blockwise_tilings(request: Request) -> tuple[Tiling, ...]:
    spans = (sum(atom.params) + 1 for atom in request.mask.atoms if atom.is_band and None not in atom.params)
    span = next(spans, _UNBOUNDED_BLOCK_Q)
    preferred = next((block for block in _BLOCKS_Q if block >= span), _UNBOUNDED_BLOCK_Q)
    return tuple(Tiling.of(block_q=block) for block in dict.fromkeys((preferred, *_BLOCKS_Q)))


def _blockwise_signature(request: Request) -> tuple[str, ...]:
    return ("kernelry.blockwise",)


BLOCKWISE = KernelSpec(
    name="blockwise",
    capabilities=Capabilities(
        platforms=frozenset({"cpu", "gpu", "tpu"}),
        interpret=True,
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        head_dims=Dims(),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=frozenset({AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.SEGMENTS, AtomKind.SEGMENTS_SEPARATE}),
        positions=frozenset({PositionKind.OFFSET}),
        features=frozenset({Feature.SCALE, Feature.SOFT_CAP, Feature.SINKS, Feature.PRECISION, Feature.MAX_LOGITS}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax", "softmax_max_sum"}),
        gradient=Gradient.NATIVE,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE, Operand.SINKS}),
        lse_cotangent=True,
        empty_rows=True,
        clean_hidden_slots=True,
        tolerances=_TOLERANCES,
    ),
    load="kernelry_dot_product.blockwise:BlockwiseKernel",
    tilings=_blockwise_tilings,
    signature=_blockwise_signature,
    summary="one block of queries at a time in plain XLA; memory O(block·S), sliding windows O(T·window)",
)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [DOT_PRODUCT, BLOCKWISE]
