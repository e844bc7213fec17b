"""What would have to change for another kernel to be chosen: the nearest change for each.

One fact of the request is varied at a time, over a bounded, deterministic set of neighbours: the
lengths over powers of two and the policy's own bounds, with the edge found by bisection and checked
beyond it, then single options left out, modes, dtypes and head dims. The platform stays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, final

from kernelry.errors import KernelryError
from kernelry.kernel.capabilities import Feature
from kernelry.masks.form import MaskForm, PositionKind
from kernelry.request.request import NEUTRAL, Mode, Request

Ask = Callable[[Request], "str | None"]
"""Returns the name of the kernel that a request would get; None for no kernel."""

_LENGTHS = tuple(2**power for power in range(21))
"""Tokens; up to a million."""

_HEAD_DIMS = (64, 128, 256)
_DTYPES = ("bfloat16", "float16", "float32")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A change of one fact of the request after which another kernel is chosen.

    Args:
      kernel: what would be chosen.
      fields: the fields of the request that change.
      condition: how, e.g. `q_len and kv_len ≥ 512`.
      example: the value tried, as in the request's JSON form where it is plain.
    """

    kernel: str
    fields: tuple[str, ...]
    condition: str
    example: str

    def __str__(self) -> str:
        return f"{self.kernel} with {self.condition}"

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**dataclasses.asdict(self), "fields": list(self.fields)}


def nearest_changes(request: Request, chosen: str | None, ask: Ask, bounds: tuple[int, ...] = ()) -> tuple[Change, ...]:
    """Returns for each kernel that a single change would choose the nearest such change.

    Args:
      request: what was asked.
      chosen: the kernel it got.
      ask: resolves another request in the same circumstances.
      bounds: lengths to try besides the powers of two: those that the policy names.
    """
    found: dict[str, Change] = {}
    for change in (*_of_lengths(request, chosen, ask, bounds), *_of_options(request, ask)):
        if change.kernel != chosen:
            found.setdefault(change.kernel, change)
    return tuple(found[name] for name in sorted(found))


def _of_lengths(request: Request, chosen: str | None, ask: Ask, bounds: tuple[int, ...]) -> Iterator[Change]:
    """The nearest boundary of each kernel, longer or shorter; in self-attention both lengths move together."""
    if PositionKind.STATIC in request.mask.position_kinds:
        return  # those positions belong to these lengths
    together = ("q_len", "kv_len")
    sets = (together,) if request.q_len == request.kv_len else (("kv_len",), ("q_len",))
    for fields in sets:
        start = getattr(request, fields[0])

        @functools.cache
        def asked(length: int, fields: tuple[str, ...] = fields) -> str | None:
            return _answer(ask, lambda: _with_lengths(request, fields, length))

        lengths = sorted({*_LENGTHS, *bounds}, key=lambda length: (abs(_steps(length) - _steps(start)), length))
        answers = {length: asked(length) for length in lengths if length != start}
        seen: set[str] = set()
        for length, kernel in answers.items():
            if kernel is None or kernel == chosen or kernel in seen:
                continue
            seen.add(kernel)
            edge = _edge(start, length, kernel, asked)
            sign = _sign(edge, edge > start, kernel, asked)
            yield Change(kernel, fields, f"{' and '.join(fields)} {sign} {edge}", str(edge))


def _steps(length: int) -> int:
    return length.bit_length()


def _edge(start: int, length: int, kernel: str, asked: Callable[[int], str | None]) -> int:
    """Bisects between a length that does not choose the kernel and one that does."""
    outside, inside = start, length
    while abs(inside - outside) > 1:
        middle = (inside + outside) // 2
        if asked(middle) == kernel:
            inside = middle
        else:
            outside = middle
    return inside


def _sign(edge: int, upwards: bool, kernel: str, asked: Callable[[int], str | None]) -> str:
    """`≥` or `≤` where every length tried beyond the edge agrees, odd ones too, else `=`."""
    beyond = {near for length in (edge, *_LENGTHS) for near in (length - 1, length, length + 1, length + length // 2)}
    tried = (length for length in beyond if length > 0 and (length >= edge if upwards else length <= edge))
    if all(asked(length) == kernel for length in tried):
        return "≥" if upwards else "≤"
    return "="


def _of_options(request: Request, ask: Ask) -> Iterator[Change]:
    for field, condition, changed in _neighbours(request):
        kernel = _answer(ask, changed)
        if kernel is not None:
            yield Change(kernel, (field,), condition, condition.rpartition("=")[2])


_Neighbour = tuple[str, str, Callable[[], Request]]


def _neighbours(request: Request) -> Iterator[_Neighbour]:
    def changed(**fields: Any) -> Callable[[], Request]:
        return lambda: _changed(request, **fields)

    for feature in Feature:
        name = feature.value
        if feature is not Feature.SCALE and getattr(request, name) != NEUTRAL[name]:
            yield (
                name,
                f"no {name}" if NEUTRAL[name] in (None, False, 0.0) else f"{name}={NEUTRAL[name]}",
                changed(**{name: NEUTRAL[name]}),
            )
    if request.scale != request.default_scale:
        yield "scale", "scale=None", changed(scale=None)
    for name in ("kv_quantization", "page_size", "context_parallel"):
        if getattr(request, name) is not None:
            yield name, f"no {name}", changed(**{name: None})
    if request.partial:
        yield "partial", "no partial", changed(partial=False)
    for atom in request.mask.atoms:
        rest = MaskForm(tuple(other for other in request.mask.atoms if other is not atom))
        yield "mask", f"mask={rest}", changed(mask=rest)
    for mode in Mode:
        if mode is not request.mode:
            yield "mode", f"mode={mode.value}", changed(mode=mode)
    for dtype in _DTYPES:
        if dtype != request.dtype:
            yield "dtype", f"dtype={dtype}", changed(dtype=dtype)
    for dim in _HEAD_DIMS:
        if (dim, dim) != (request.head_dim, request.value_dim):
            yield "head_dim", f"head_dim={dim}", changed(head_dim=dim, value_dim=dim)
    if request.groups > 1:
        yield "kv_heads", f"kv_heads={request.q_heads}", changed(kv_heads=request.q_heads)


def _changed(request: Request, **fields: Any) -> Request:
    if "head_dim" in fields and request.scale == request.default_scale:
        fields["scale"] = None
    operands = {operand for operand in request.gradients if not _is_left_out(operand.value, fields)}
    mode = fields.get("mode", request.mode)
    fields["gradients"] = operands if mode is request.mode else None
    return dataclasses.replace(request, **fields)


def _is_left_out(operand: str, fields: dict[str, Any]) -> bool:
    return operand in fields and not fields[operand]


def _with_lengths(request: Request, fields: tuple[str, ...], length: int) -> Request:
    given: dict[str, Any] = dict.fromkeys(fields, length)
    if request.bias is not None:
        batch, heads, rows, slots = request.bias
        rows = given.get("q_len", rows) if rows != 1 else 1
        slots = given.get("kv_len", slots) if slots != 1 else 1
        given["bias"] = (batch, heads, rows, slots)
    return dataclasses.replace(request, **given)


def _answer(ask: Ask, make: Callable[[], Request]) -> str | None:
    try:
        return ask(make())
    except KernelryError:
        return None  # no such request: partial with sinks, say
