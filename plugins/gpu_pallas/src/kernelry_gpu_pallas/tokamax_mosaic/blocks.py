"""Block sizes of the vendor's kernels, and which of them a streaming multiprocessor has room for.

The vendor's own choice asks the device of this process; this one asks the request alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kernelry.errors import ConfigError
from kernelry.plugin import AtomKind, Request, Tiling, round_up

NAME = "tokamax_mosaic"

HOPPER, BLACKWELL = 90, 100
"""Compute capability times ten."""

STEP = 128
"""Slots that every block divides, or two of them side by side."""

_SHARED_BYTES = 227 * 1024
"""Shared memory a block of threads may have, of both generations (NVIDIA, CUDA C++ Programming Guide, table 'Technical
Specifications per Compute Capability')."""

_OTHER_BYTES = 4096
"""Room left for barriers and for the rounding of each array to 1024 bytes."""

_TENSOR_COLUMNS = 512
"""Columns of Blackwell's tensor memory, of 32 bits in each of 128 lanes (NVIDIA, PTX ISA, section 'Tensor Memory')."""

_SIDE_BY_SIDE = 2
"""Warpgroups on Hopper: each has block_q rows of queries of its own, or block_kv_dkv of keys."""

_SHORT, _SINGLE, _BYTE = 2, 4, 1
"""Bytes of an element of queries, keys, values and outputs; of a bias or its gradient, at most; of a mask."""

_FORWARD = ("block_q", "block_kv", "num_stages")
_BACKWARD = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq", "num_stages_backward")

_HOPPER_FORWARD = ((64, 128, 2), (64, 64, 2), (64, 128, 3), (128, 128, 2), (128, 64, 2), (64, 256, 2), (64, 64, 1))
_HOPPER_BACKWARD = ((64, 64, 64, 64, 2), (64, 128, 64, 128, 2), (128, 64, 128, 64, 2), (64, 64, 64, 64, 1))
_BLACKWELL_FORWARD = ((128, 128, 2), (128, 128, 4), (128, 128, 3), (128, 128, 1))
_BLACKWELL_BACKWARD = tuple((block, 128, 128, block, stages) for block in (128, 64) for stages in (4, 3, 2, 1))
"""The vendor's choice first, where there is room for it, then what it searches."""


def tilings(request: Request) -> tuple[Tiling, ...]:
    """The search space, of which only what there is room for; empty where there is none."""
    hopper = request.target.generation != BLACKWELL
    forward = _named(_FORWARD, _HOPPER_FORWARD if hopper else _BLACKWELL_FORWARD)
    backward = _named(_BACKWARD, _HOPPER_BACKWARD if hopper else _BLACKWELL_BACKWARD)
    forward = [values for values in forward if not any(_forward_problems(request, values))]
    if request.gradients:
        backward = [values for values in backward if not any(_backward_problems(request, values))]
    if not forward or not backward:
        return ()
    rest = [forward[0] | values for values in backward[1:]] if request.gradients else []
    return tuple(Tiling.of(**values) for values in ([values | backward[0] for values in forward] + rest))


def _named(names: tuple[str, ...], choices: tuple[tuple[int, ...], ...]) -> list[dict[str, int]]:
    return [dict(zip(names, values, strict=True)) for values in choices]


def check(request: Request, tiling: Tiling) -> None:
    """Checks what the vendor does not, or only while the program is compiled.

    Raises:
      ConfigError: a block does not divide its length, or there is no room for it.
    """
    values = dict(tiling.values)
    problems = _forward_problems(request, values)
    if request.gradients:
        problems = (*problems, *_backward_problems(request, values))
    for problem in problems:
        raise ConfigError(f"tiling: {problem} of {NAME}; leave it out, or choose among its tilings(request)")


def _forward_problems(request: Request, values: Mapping[str, int]) -> tuple[str, ...]:
    block_q, block_kv, stages = (values[name] for name in _FORWARD)
    if request.target.generation == BLACKWELL:
        fixed = _other_than(values, ("block_q", "block_kv"), STEP)
        return tuple(fixed) or tuple(_too_much("forward", _blackwell_forward(request, block_q, block_kv, stages)))
    steps = {"block_q": (_SIDE_BY_SIDE, request.q_len), "block_kv": (1, request.kv_len)}
    uneven = tuple(_uneven(values, steps))
    return uneven or tuple(_too_much("forward", _hopper_forward(request, block_q, block_kv, stages)))


def _backward_problems(request: Request, values: Mapping[str, int]) -> tuple[str, ...]:
    q_dkv, kv_dkv, q_dq, kv_dq, stages = (values[name] for name in _BACKWARD)
    if request.target.generation == BLACKWELL:
        steps = {"block_q_dkv": (1, request.q_len), "block_kv_dq": (1, request.kv_len)}
        wrong = (*_other_than(values, ("block_kv_dkv", "block_q_dq"), STEP), *_uneven(values, steps))
        return wrong or tuple(_blackwell_backward_problems(request, q_dkv, kv_dq, stages))
    steps = {
        "block_q_dkv": (1, request.q_len),
        "block_kv_dkv": (_SIDE_BY_SIDE, request.kv_len),
        "block_q_dq": (_SIDE_BY_SIDE, request.q_len),
        "block_kv_dq": (1, request.kv_len),
    }
    return tuple(_uneven(values, steps)) or (
        *_too_much("dQ", _hopper_dq(request, q_dq, kv_dq, stages)),
        *_too_much("dK and dV", _hopper_dkv(request, q_dkv, kv_dkv, stages)),
    )


def _uneven(values: Mapping[str, int], steps: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    for name, (side_by_side, length) in steps.items():
        block = values[name]
        if block % 64 or length % (side_by_side * block):
            yield f"{name}={block} is not a multiple of 64 of which {side_by_side} divide the length {length}"


def _other_than(values: Mapping[str, int], names: tuple[str, ...], only: int) -> Iterator[str]:
    for name in names:
        if values[name] != only:
            yield f"{name}={values[name]} is not {only}"


def _too_much(what: str, wanted: int) -> Iterator[str]:
    if wanted + _OTHER_BYTES > _SHARED_BYTES:
        yield f"{what} needs {wanted} of {_SHARED_BYTES - _OTHER_BYTES} bytes of shared memory"


def _hopper_forward(request: Request, block_q: int, block_kv: int, stages: int) -> int:
    head, value = _padded(request, 16)
    rows = _SIDE_BY_SIDE * block_q
    inputs = (rows + stages * block_kv) * head * _SHORT
    width = 64 if value % 64 == 0 else value
    slots = min(2, block_q // 64 * (value // width))
    outputs = _SIDE_BY_SIDE * slots * 64 * width * _SHORT + 2 * rows * _SINGLE
    return max(inputs, outputs) + stages * (block_kv * value * _SHORT + _pairs(request, rows * block_kv))


def _hopper_dq(request: Request, block_q: int, block_kv: int, stages: int) -> int:
    rows, dims = _SIDE_BY_SIDE * block_q, sum(_padded(request, 64))
    share = 0 if request.bias is None else rows * block_kv * _SINGLE
    stage = block_kv * dims * _SHORT + _pairs(request, rows * block_kv)
    return rows * dims * _SHORT + share + stages * stage


def _hopper_dkv(request: Request, block_q: int, block_kv: int, stages: int) -> int:
    slots, dims = _SIDE_BY_SIDE * block_kv, sum(_padded(request, 64))
    stage = block_q * (dims * _SHORT + 3 * _SINGLE) + _pairs(request, slots * block_q)
    return slots * dims * _SHORT + stages * stage


def _blackwell_forward(request: Request, block_q: int, block_kv: int, stages: int) -> int:
    head, value = _padded(request, 16)
    inputs = (block_q * head + stages * block_kv * (head + value)) * _SHORT
    outputs = min(2, max(value // 64, 1)) * block_q * (64 if value % 64 == 0 else value) * _SHORT
    return max(inputs, outputs) + 3 * block_q * _SINGLE + _pairs(request, block_q * block_kv)


def _blackwell_backward_problems(request: Request, q_dkv: int, kv_dq: int, stages: int) -> Iterator[str]:
    head, value = _padded(request, 64)
    columns = max(2 * q_dkv + head + value, 2 * kv_dq + head)
    if columns > _TENSOR_COLUMNS:
        yield f"the backward pass needs {columns} of {_TENSOR_COLUMNS} columns of tensor memory"
    share = 0 if request.bias is None else STEP * kv_dq * _SINGLE
    yield from _too_much(
        "dQ", (STEP + stages * kv_dq) * (head + value) * _SHORT + share + _pairs(request, STEP * kv_dq)
    )
    statistics = 6 * q_dkv * _SINGLE
    yield from _too_much(
        "dK and dV", (STEP + stages * q_dkv) * (head + value) * _SHORT + statistics + _pairs(request, STEP * q_dkv)
    )


def _padded(request: Request, step: int) -> tuple[int, int]:
    head, value = (round_up(dim, step) for dim in (request.head_dim, request.value_dim))
    return head, value


def _pairs(request: Request, count: int) -> int:
    """Bytes of bias and mask for so many pairs of a query and a key."""
    dense = any(atom.kind is AtomKind.DENSE for atom in request.mask.atoms)
    return count * (_SINGLE * (request.bias is not None) + _BYTE * dense)
