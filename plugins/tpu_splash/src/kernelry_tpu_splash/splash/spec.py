"""What `splash` declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from kernelry.plugin import (
    Atom,
    AtomKind,
    Capabilities,
    Dims,
    Environment,
    Feature,
    Gradient,
    KernelSpec,
    MaskForm,
    Mode,
    Operand,
    PositionForm,
    PositionKind,
    Refusal,
    RefusalCode,
    Request,
    Statistic,
    Tiling,
    Tolerance,
)
from kernelry_tpu_splash.lanes import LANES

_BLOCKS = (512, 1024, 256, 128)
"""Elements; the block sizes of the search space. The default, 512, is MaxText's (sa_block_q and its
siblings); 2048 runs out of vector memory on v5e."""

_LAYOUTS = {"q_layout": 1, "k_layout": 1, "v_layout": 1}
"""1 has the head dimension last, 2 the sequence: the vendor's QKVLayout."""

_BACKWARD_KERNELS = {"backward_kernels": 2}
"""2: one over dQ, one over dK and dV. 1: fused; dQ then comes in S / block_kv_dkv parts that are summed."""

_BLOCK_NAMES_Q = ("block_q", "block_q_dkv", "block_q_dq")
_BLOCK_NAMES_KV = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq")


_SEGMENTS = frozenset({AtomKind.SEGMENTS, AtomKind.SEGMENTS_SEPARATE})

_COMPUTED = frozenset({AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.CHUNKED, AtomKind.BLOCK_CAUSAL, AtomKind.PREDICATE})
"""Atoms that the kernel evaluates in its blocks, from positions."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    lengths = (("q_len", request.q_len, "block_q"), ("kv_len", request.kv_len, "block_kv"))
    uneven = tuple(_uneven(*length) for length in lengths if length[1] % LANES)
    return (*uneven, *_mask_refusals(request.mask))


def _mask_refusals(mask: MaskForm) -> Iterator[Refusal]:
    segments = [atom for atom in mask.atoms if atom.kind in _SEGMENTS]
    computed = [atom for atom in mask.atoms if atom.kind not in _SEGMENTS]
    if len(segments) > 1:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={mask} has {len(segments)} pairs of ids")
    for atom in computed:
        yield from _atom_refusals(atom, alone=len(computed) == 1)


def _atom_refusals(atom: Atom, *, alone: bool) -> Iterator[Refusal]:
    traced = PositionKind.TRACED
    if traced in atom.position_kinds:
        if atom.kv.kind is traced or atom.query.kind is not traced:
            yield Refusal(RefusalCode.POSITIONS, f"mask atom {atom} has traced positions of keys, or inside")
        elif not alone:
            yield Refusal(RefusalCode.POSITIONS, f"mask atom {atom} has traced positions beside another atom")
    if not dataclasses.replace(atom, query=PositionForm(), kv=PositionForm()).is_static:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask atom {atom} depends on arrays")
    for form in _positions_in(atom):
        if form.kind is PositionKind.STATIC and not form.is_arithmetic:
            yield Refusal(RefusalCode.POSITIONS, f"mask atom {atom} has positions by row or in many runs")


def _positions_in(atom: Atom) -> Iterator[PositionForm]:
    yield atom.query
    yield atom.kv
    for form in atom.params:
        if isinstance(form, MaskForm):
            for inside in form.atoms:
                yield from _positions_in(inside)


def _uneven(name: str, length: int, block: str) -> Refusal:
    padded = -(-length // LANES) * LANES
    detail = f"{name}={length} is not a multiple of {LANES}, the smallest {block}"
    return Refusal(RefusalCode.SEQUENCE_LENGTH, detail, f"pad to {padded}", ((name, padded),))


def _tilings(request: Request) -> tuple[Tiling, ...]:
    return tuple(dict.fromkeys(_tiling(request, block) for block in _BLOCKS))


def _tiling(request: Request, block: int) -> Tiling:
    block_q, block_kv = _largest_divisor(request.q_len, block), _largest_divisor(request.kv_len, block)
    blocks = {**dict.fromkeys(_BLOCK_NAMES_Q, block_q), **dict.fromkeys(_BLOCK_NAMES_KV, block_kv)}
    return Tiling.of(**blocks, **_LAYOUTS, **_BACKWARD_KERNELS)


def _largest_divisor(length: int, block: int) -> int:
    """The largest multiple of 128, at most `block`, that divides the length."""
    return next(size for size in range(block, 0, -LANES) if length % size == 0)


def _signature(request: Request) -> tuple[str, ...]:
    interpreted = request.interpret and request.target.platform == "cpu"
    return ("kernelry.splash",) if interpreted else ("tpu_custom_call", "kernelry.splash")


SPLASH = KernelSpec(
    name="splash",
    capabilities=Capabilities(
        platforms=frozenset({"tpu"}),
        interpret=True,
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float32", "bfloat16"}),
        head_dims=Dims(maximum=512),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=_COMPUTED | _SEGMENTS | {AtomKind.ANY_OF, AtomKind.NOT},
        positions=frozenset({PositionKind.OFFSET, PositionKind.STATIC, PositionKind.TRACED}),
        features=frozenset({Feature.SCALE, Feature.SOFT_CAP}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
        tolerances=(
            Tolerance("float32", 2e-6, 2e-5, "float32 products and sums, in another order than the oracle's"),
            Tolerance("bfloat16", 1e-2, 4e-2, "scaled queries, output and gradients are rounded to 8 bits of mantissa"),
        ),
    ),
    load="kernelry_tpu_splash.splash.kernel:SplashKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=_signature,
    summary="JAX's splash attention for TPUs; computes static masks, skips hidden blocks; lengths in multiples of 128",
)
