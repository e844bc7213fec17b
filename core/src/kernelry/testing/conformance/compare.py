"""Compares answers with the float64 oracle, within the tolerances that the kernel declares."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from kernelry.kernel.capabilities import Capabilities, Tolerance
from kernelry.kernel.common import standard_tolerances
from kernelry.storage import VALUE_IN_KEY
from kernelry.testing.conformance.bench import Answer
from kernelry.testing.conformance.calls import QKV, AttentionCall
from kernelry.testing.reference import reference_attention, reference_gradients

SANE = {
    "float32": Tolerance("float32", 1e-4, 1e-3, "the largest that a float32 kernel may declare"),
    "bfloat16": Tolerance("bfloat16", 5e-2, 2e-1, "the largest that a 16-bit kernel may declare"),
    "float16": Tolerance("float16", 5e-2, 2e-1, "the largest that a 16-bit kernel may declare"),
    "float64": Tolerance("float64", 1e-4, 1e-3, "logits and statistics are float32 nevertheless"),
}
"""Larger tolerances would hide wrong results."""

_DEFAULT = {mine.dtype: mine for mine in standard_tolerances(*SANE)}

_BIASED_OUT = 1e-2
"""The error of a logit of −2e4: float32 has steps of 2e-3 there, and kernels in base 2 round it again."""


@final
class MismatchError(AssertionError):
    """An answer that differs from the oracle's."""


def tolerance_for(can: Capabilities, call: AttentionCall) -> Tolerance:
    """The kernel's tolerance, no larger than the sane one; logits in fewer bits have their own.

    Rounding errors of the logits grow with their size, and the softmax keeps them: large logits widen the tolerance.
    """
    declared = {tolerance.dtype: tolerance for tolerance in can.tolerances}
    narrow = min((call.dtype, call.logits_dtype), key=lambda dtype: np.dtype(_numpy(dtype)).itemsize)
    if narrow != call.dtype:
        return SANE[narrow]
    mine, sane = declared.get(call.dtype, _DEFAULT[call.dtype]), SANE[call.dtype]
    size, more = max(1.0, call.magnitude, call.level**2), _BIASED_OUT if call.biased_out is not None else 0.0
    forward, gradient = min(mine.forward, sane.forward), min(mine.gradient, sane.gradient)
    return Tolerance(call.dtype, size * forward + more, size * gradient + more, mine.reason)


def _numpy(dtype: str) -> str:
    return "float16" if dtype == "bfloat16" else dtype


def oracle(call: AttentionCall, *, seed: int = 0) -> Answer:
    """The float64 answer, always with statistics."""
    arrays = call.numbers(seed)
    known: dict[str, Any] = {name: array for name, array in arrays.items() if name not in QKV}
    known |= {name: getattr(call, name) for name in ("mask", "scale", "soft_cap", "bias_after_cap")}
    qkv = [arrays[name] for name in QKV]
    found = reference_attention(*qkv, **known)
    if not call.wanted:
        return Answer(found.out, found.lse, found.max_logits, {})
    cotangents = call.cotangents(seed)
    gradients = reference_gradients(*qkv, d_out=cotangents["out"], d_lse=cotangents.get("lse"), **known)
    wanted = {operand.value: getattr(gradients, operand.value) for operand in call.wanted}
    if call.kv_layout == VALUE_IN_KEY and "key" in wanted:
        wanted["key"] = wanted["key"] + np.pad(gradients.value, [(0, 0)] * 3 + [(0, call.head_dim - call.value_dim)])
    return Answer(found.out, found.lse, found.max_logits, wanted)


def verify(answer: Answer, expected: Answer, call: AttentionCall, tolerance: Tolerance) -> None:
    """Compares an answer with the oracle's, as far as the call asks for it.

    The error allowed is the tolerance times the largest magnitude expected, at least 1.

    Raises:
      MismatchError: a number, a shape or a dtype is wrong; the message says which and by how much.
    """
    if str(answer.out.dtype) != call.dtype:
        raise MismatchError(f"out is {answer.out.dtype}, not the query's {call.dtype}")
    close("out", answer.out, expected.out, tolerance.forward)
    if call.partial:
        close("lse", answer.lse, expected.lse, tolerance.forward)
    if call.max_logits:
        if answer.max_logits is None:
            raise MismatchError("max_logits were asked for and not returned")
        close("max_logits", answer.max_logits, expected.max_logits, tolerance.forward)
    for name, gradient in sorted(answer.gradients.items()):
        close(f"gradient of {name}", gradient, expected.gradients[name], tolerance.gradient)


def close(name: str, found: Any, expected: Any, tolerance: float) -> None:
    """Compares two arrays; infinities must agree exactly.

    Raises:
      MismatchError: they differ.
    """
    mine, theirs = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if mine.shape != theirs.shape:
        raise MismatchError(f"{name} has shape {mine.shape}, expected {theirs.shape}")
    finite = np.isfinite(theirs)
    allowed = tolerance * max(1.0, float(np.abs(theirs[finite]).max(initial=0.0)))
    wrong = np.where(finite, ~(np.abs(mine - np.where(finite, theirs, 0)) <= allowed), mine != theirs)
    if not wrong.any():
        return
    first = tuple(int(index) for index in np.argwhere(wrong)[0])
    both = wrong & finite & np.isfinite(mine)
    distance = np.abs(mine[both] - theirs[both]).max(initial=0.0)
    raise MismatchError(
        f"{name} is wrong in {int(wrong.sum())} of {wrong.size} places, by up to {distance:.3g} where {allowed:.3g} "
        f"is allowed; e.g. at {first} it is {mine[first]:.6g}, not {theirs[first]:.6g}"
    )
