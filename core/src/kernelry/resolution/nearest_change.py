"""What would have to change for another kernel to be chosen: the nearest change for each.

One fact of the request is varied at a time, over a fixed set of neighbours: the lengths over the policy's own bounds
and powers of two, then single options left out, atoms of the mask, modes, dtypes and head dims. The platform stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

from kernelry.errors import KernelryError
from kernelry.masks.form import MaskForm, PositionKind
from kernelry.request.request import NEUTRAL, Mode, Request

_LENGTHS = tuple(2**power for power in range(21))
"""Tokens; up to a million."""

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

    def changed(**fields: Any) -> str:
        try:
            return ask(_changed(request, fields)) or ""
        except KernelryError:
            return ""  # no such request: partial with sinks, say

    found: dict[str, Change] = {}
    for change in (*_of_lengths(request, changed, bounds), *_of_options(request, changed)):
        found.setdefault(change.kernel, change)
    return tuple(found[name] for name in sorted(found.keys() - {chosen, ""}))


def _of_lengths(request: Request, changed: Callable[..., str], bounds: tuple[int, ...]) -> Iterator[Change]:
    """The nearest length of each kernel, longer or shorter; in self-attention both lengths move together."""
    if PositionKind.STATIC in request.mask.position_kinds:
        return  # those positions belong to these lengths
    for fields in (("q_len", "kv_len"),) if request.q_len == request.kv_len else (("kv_len",), ("q_len",)):
        start = getattr(request, fields[0])
        lengths = sorted({*_LENGTHS, *bounds} - {start})
        # Multiples of powers of two suit kernels that other lengths do not: what holds beyond a length is tried there.
        between = {max(1, near) for n in lengths for near in (n - 1, n, n + 1, n + n // 2)}
        answers = {length: changed(**dict.fromkeys(fields, length)) for length in sorted({*lengths, *between})}
        for length in sorted(lengths, key=lambda n: (abs(n.bit_length() - start.bit_length()), abs(n - start))):
            upwards = length > start
            beyond = {answers[n] for n in answers if (n >= length if upwards else 0 < n <= length)}
            sign = "=" if len(beyond) > 1 else "≥" if upwards else "≤"
            yield Change(answers[length], fields, f"{' and '.join(fields)} {sign} {length}", str(length))


def _of_options(request: Request, changed: Callable[..., str]) -> Iterator[Change]:
    for name, condition, value in _options(request):
        yield Change(changed(**{name: value}), (name,), condition, condition.rpartition("=")[2])


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
