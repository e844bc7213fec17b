"""What is logged about a new resolution: one line of information, and warnings worth a look."""

from __future__ import annotations

import functools
import logging

import jax.numpy as jnp

from kernelry.errors import nearest
from kernelry.kernel.refusal import RefusalCode
from kernelry.policy.rules import Rule
from kernelry.request.request import Request
from kernelry.resolution.explanation import Candidate, Resolution
from kernelry.resolution.question import Question

_logger = logging.getLogger("kernelry")
_ELSEWHERE = frozenset({RefusalCode.PLATFORM, RefusalCode.NOT_INSTALLED})


def log_resolution(resolution: Resolution, question: Question) -> None:
    """Logs the decision, adapters that more than double memory, and preferred kernels that were refused."""
    _logger.info("%s", resolution.headline)
    _warn_of_tilings(tuple(name for name, _ in question.policy.tilings), tuple(sorted(question.pool)))
    if resolution.plan is None:
        return  # the error tells every reason
    _warn_of_memory(resolution)
    if question.forced is None:
        for candidate in _passed_over(resolution, question):
            _logger.warning(
                "preferred kernel %s was refused for %s: %s; %s runs instead",
                candidate.name,
                resolution.request,
                candidate.refusals[0],
                resolution.kernel,
            )


def _warn_of_memory(resolution: Resolution) -> None:
    if resolution.plan is None:
        return
    own, extra = array_bytes(resolution.request), resolution.plan.cost.extra_bytes
    if extra > own:
        through = ", ".join(step.adapter.name for step in resolution.plan.steps)
        _logger.warning(
            "adapters of %s more than double the memory of %s: %s add %d bytes to %d",
            resolution.kernel,
            resolution.request,
            through,
            extra,
            own,
        )


def array_bytes(request: Request) -> int:
    """Returns the bytes of query, key, value and output together."""
    queries = request.q_len * request.q_heads * (request.head_dim + request.value_dim)
    keys = request.kv_len * request.kv_heads * (request.head_dim + request.value_dim)
    return int(request.batch * (queries + keys) * jnp.dtype(request.dtype).itemsize)


def _passed_over(resolution: Resolution, question: Question) -> list[Candidate]:
    """The kernels that the deciding rule names before the winner, all of them refused.

    Of the shipped preferences only kernels that belong on this platform count: a CPU has no use
    for a line about each GPU kernel. A user's rule means what it says.
    """
    ruled = next((rule for rule in question.policy.rules if rule.when.matches(resolution.request)), None)
    named = ruled or _default(question)
    if named is None:
        return []
    passed = []
    for candidate in resolution.candidates:
        if candidate.name == resolution.kernel:
            break
        codes = {refusal.code for refusal in candidate.refusals}
        if candidate.name in named.names and codes and (ruled is not None or not codes & _ELSEWHERE):
            passed.append(candidate)
    return passed


def _default(question: Question) -> Rule | None:
    return next((rule for rule in question.policy.defaults if rule.when.matches(question.request)), None)


@functools.lru_cache(maxsize=256)
def _warn_of_tilings(names: tuple[str, ...], installed: tuple[str, ...]) -> None:
    """Notices misspelt kernels in `tilings`, once; a plugin may rightly be absent, so this is no error."""
    for name in names:
        if name not in installed:
            _logger.warning("tilings: no installed kernel is called %r%s", name, nearest(name, installed))
