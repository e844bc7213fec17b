"""What would have to change for another kernel to be chosen: the nearest change for each.

One fact of the request is varied at a time, over a fixed set of neighbours: the lengths over powers of two and the
policy's own bounds, with the edge found by bisection, then single options left out, modes, dtypes and head dims. The
platform stays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

from kernelry.errors import KernelryError
from kernelry.masks.form import MaskForm, PositionKind
from kernelry.request.request import NEUTRAL, Mode, Request

_LENGTHS = tuple(2**power for power in range(21))
_VALUES: dict[str, Iterable[Any]] = {
    "mode": Mode,
    "dtype": ("bfloat16", "float16", "float32"),
    "head_dim": (64, 128, 256),
}


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


def nearest_changes(
    request: Request, chosen: str | None, ask: Callable[[Request], str | None], bounds: tuple[int, ...] = ()
) -> tuple[Change, ...]:
    """Returns for each kernel that a single change would choose the nearest such change.

    Args:
      request: what was asked.
      chosen: the kernel it got.
      ask: returns the kernel that another request would get in the same circumstances; None for no kernel.
      bounds: lengths to try besides the powers of two: those that the policy names.
    """

    def changed(**fields: Any) -> str | None:
        try:
            return ask(_changed(request, fields))
        except KernelryError:
            return None  # no such request: partial with sinks, say

    found: dict[str, Change] = {}
    # Static positions belong to their lengths; of a length that is cut, few neighbours divide.
    fixed = PositionKind.STATIC in request.mask.position_kinds or request.sharding is not None
    for fields in (("q_len", "kv_len"),) if request.q_len == request.kv_len else (("kv_len",), ("q_len",)):
        if not fixed:
            asked = functools.cache(lambda length, fields=fields: changed(**dict.fromkeys(fields, length)))
            for other, sign, edge in _edges(getattr(request, fields[0]), chosen, asked, bounds):
                found.setdefault(other, Change(other, fields, f"{' and '.join(fields)} {sign} {edge}", str(edge)))
    for name, condition, value in _options(request):
        kernel = changed(**{name: value})
        if kernel is not None:
            found.setdefault(kernel, Change(kernel, (name,), condition, condition.rpartition("=")[2]))
    return tuple(found[name] for name in sorted(found) if name != chosen)


def _edges(
    start: int, chosen: str | None, asked: Callable[[int], str | None], bounds: tuple[int, ...]
) -> Iterator[tuple[str, str, int]]:
    """The nearest length at which each kernel is chosen, and whether that holds beyond."""
    seen = {chosen}
    steps = start.bit_length()
    for near in sorted({*_LENGTHS, *bounds} - {start}, key=lambda n: (abs(n.bit_length() - steps), n)):
        kernel, inside, outside = asked(near), near, start
        if kernel is None or kernel in seen:
            continue
        seen.add(kernel)
        while abs(inside - outside) > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if asked(middle) == kernel else (inside, middle)
        # Odd lengths too, for a kernel may serve only multiples of its block.
        beyond = {n + more for n in (inside, *_LENGTHS) for more in (-1, 0, 1, n // 2)} - {0}
        tried = (n for n in beyond if (n >= inside if inside > start else n <= inside))
        sign = "≥" if inside > start else "≤"
        yield kernel, sign if all(asked(n) == kernel for n in tried) else "=", inside


def _options(request: Request) -> Iterator[tuple[str, str, Any]]:
    """The other facts to vary: a field, how it changes in words, and its value."""
    for name, neutral in NEUTRAL.items():
        if name not in ("mask", "interpret") and getattr(request, name) != neutral:
            yield name, f"no {name}" if neutral in (None, False, 0.0) else f"{name}={neutral}", neutral
    if request.scale != request.default_scale:
        yield "scale", "scale=None", None
    for atom in request.mask.atoms:
        rest = MaskForm(tuple(other for other in request.mask.atoms if other is not atom))
        yield "mask", f"mask={rest}", rest
    for name, values in {**_VALUES, "kv_heads": (request.q_heads,)}.items():
        yield from ((name, f"{name}={value.value if isinstance(value, Mode) else value}", value) for value in values)


def _changed(request: Request, fields: dict[str, Any]) -> Request:
    """The request with other fields, and with what must change along: the bias's shape, the scale, the gradients."""
    fields = dict(fields)
    if "head_dim" in fields:
        fields["value_dim"] = fields["head_dim"]
        fields["scale"] = None if request.scale == request.default_scale else request.scale
    if request.bias is not None and "bias" not in fields:
        batch, heads, rows, slots = request.bias
        q_len, kv_len = fields.get("q_len", request.q_len), fields.get("kv_len", request.kv_len)
        fields["bias"] = (batch, heads, rows if rows == 1 else q_len, slots if slots == 1 else kv_len)
    operands = {operand for operand in request.gradients if fields.get(operand.value, True)}
    fields["gradients"] = operands if fields.get("mode", request.mode) is request.mode else None
    return dataclasses.replace(request, **fields)
