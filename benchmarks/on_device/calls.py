"""A pass as a function of a shape's arrays, and those who can run it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp

from on_device.shapes import BOTH, Shape

Attend = Callable[..., jax.Array]
"""(query, key, value, ids) -> output."""

_CUSTOM_CALLS = re.compile(r"custom_call @([\w$.]+)")


class AbsentError(Exception):
    """Somebody who is not timed: `how` in a word or two, and why in the message."""

    def __init__(self, how: str, why: str) -> None:
        super().__init__(why)
        self.how = how


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """A kernel or a peer; `lower(shape, which, arrays)` gives a lowered program and facts about it, or is absent."""

    name: str
    kind: str
    lower: Callable[[Shape, str, tuple[Any, ...]], tuple[Any, dict[str, Any]]]


def lowered(attend: Attend, which: str, arrays: tuple[Any, ...]) -> Any:
    return jax.jit(of_pass(attend, which)).lower(*arrays)


def of_pass(attend: Attend, which: str) -> Callable[..., Any]:
    """The output, or Σ output · weights with its gradients by query, key and value."""

    def forward(query: Any, key: Any, value: Any, weights: Any, ids: Any) -> jax.Array:
        del weights
        return attend(query, key, value, ids)

    def loss(query: Any, key: Any, value: Any, weights: Any, ids: Any) -> jax.Array:
        return (attend(query, key, value, ids).astype(jnp.float32) * weights.astype(jnp.float32)).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2)) if which == BOTH else forward


def custom_calls(program: Any) -> list[str]:
    """What the program calls that is not XLA's own."""
    return sorted(set(_CUSTOM_CALLS.findall(program.as_text())))


def one_line(error: BaseException | str, most: int = 400) -> str:
    """The words of an error, in a line."""
    words = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    line = "; ".join(part.strip() for part in words.splitlines() if part.strip())
    return line if len(line) <= most else f"{line[:most]} …"
