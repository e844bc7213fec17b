"""What this plugin registers: `dot_product`, dense, and `blockwise`, tile by tile."""

from __future__ import annotations

import dataclasses

from kernelry.plugin import (
    QUANTIZATIONS,
    SEPARATE,
    VALUE_IN_KEY,
    AtomKind,
    Capabilities,
    Dims,
    Feature,
    Gradient,
    KernelSpec,
    ManualAxes,
    Mode,
    Operand,
    PositionKind,
    Request,
    Statistic,
    Tiling,
    hookimpl,
    signature_of,
    standard_tolerances,
)

contract = (1, 1)

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
    symbolic_sizes=frozenset({"batch", "q_len", "kv_len"}),
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
    manual_axes=ManualAxes.CHECKED,
    partitioned_by_xla=True,
    tolerances=standard_tolerances("float32", "bfloat16", "float16"),
)
_TILINGS = ((1024, 512), (512, 512), (64, 64), (128, 128), (256, 256))
"""(G·block_q, block_kv) in slots, the fastest on CPU first: benchmarks/blockwise.py."""

_DYNAMIC_TILING = (512, 512)
"""Where arrays decide what is seen, as in packed sequences: larger blocks skip less. Short calls have narrow ones."""

_NARROW_TILING = (64, 64)
_NARROW = 512
"""Slots: under a window of at most so many, small blocks skip more than they cost: benchmarks/blockwise.py."""

_SHORT = 1024
"""Slots: up to so many, all keys are one block: benchmarks/blockwise.py."""

_SHORT_ROWS = 4
_LEAST_BLOCK = 64
"""Blocks of queries of a short call, and the least block_q in slots: more blocks leave more of a causal mask out and
take longer to compile. Under a window of less than half of the keys, loops over small blocks take less time with
gradients: benchmarks/blockwise.py."""


DOT_PRODUCT = KernelSpec(
    name="dot_product",
    capabilities=_EVERYWHERE,
    load="kernelry_dot_product.dot_product:DotProductKernel",
    signature=signature_of("kernelry.dot_product"),
    summary="dense attention in plain XLA; every feature, every platform; memory O(T·S)",
)


def _blockwise_tilings(request: Request) -> tuple[Tiling, ...]:
    atoms = request.mask.atoms
    static = all(atom.is_static for atom in atoms)
    spans = (sum(atom.params) + 1 for atom in atoms if atom.is_band and None not in atom.params)
    span, length = min(spans, default=None), max(request.q_len, request.kv_len)
    first = []
    if static and length <= _SHORT and (span is None or 2 * span >= length):
        rows = -(-request.q_len // (_SHORT_ROWS if atoms else 1))
        first.append((max(_LEAST_BLOCK, rows) * request.groups, request.kv_len))
    if span is not None and span <= _NARROW:
        first.append(_NARROW_TILING)
    if not static:
        short = max(request.q_len, request.kv_len) <= _SHORT
        first.append(_NARROW_TILING if short else _DYNAMIC_TILING)
    # The queries of a group are together in a tile.
    sizes = (*first, *_TILINGS)
    blocks = dict.fromkeys((max(1, rows // request.groups), block_kv) for rows, block_kv in sizes)
    return tuple(Tiling.of(block_q=block_q, block_kv=block_kv) for block_q, block_kv in blocks)


BLOCKWISE = KernelSpec(
    name="blockwise",
    capabilities=dataclasses.replace(
        _EVERYWHERE,
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        empty_arrays=False,
        symbolic_sizes=frozenset({"batch"}),
        features=frozenset(Feature) - {Feature.LOGITS_DTYPE},
        gradient=Gradient.BACKWARD,
        backward_only=True,
        forward_over_reverse=True,
        kv_quantizations=QUANTIZATIONS,
        pages=True,
        kv_layouts=frozenset({SEPARATE, VALUE_IN_KEY}),
        partitioned_by_xla=False,
    ),
    load="kernelry_dot_product.blockwise:BlockwiseKernel",
    tilings=_blockwise_tilings,
    signature=signature_of("kernelry.blockwise"),
    summary="tile by tile in plain XLA, forward and backward; memory O(T·block), work where the mask holds anything",
)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [DOT_PRODUCT, BLOCKWISE]
