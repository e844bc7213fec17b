"""What kernelry needs of JAX that JAX does not promise to keep, and differences between its versions 0.10 … 0.12.

`jax.interpreters` and `jax.extend` are for libraries and may change with any release; core imports them here alone.
`import kernelry` imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, final

import jax
import numpy as np
from jax.interpreters import ad, batching, mlir

# jax.extend.core has it under its name, and the import of jax.extend loads Pallas: a quarter of kernelry's own import.
_Primitive: Any = type(jax.lax.add_p)

# Public, but in what order JAX hashes and compares it is not said: 0.10 … 0.12 hash it before they trace, and only
# compare it where they find a compiled program. tests/core/test_scopes.py fails where that changes.
scope_key: Any = jax.make_user_context(None)  # type: ignore[no-untyped-call]
"""A value that each thread has, None at first, and that is part of the key of JAX's caches of programs."""


def abstract_device(mesh: jax.sharding.AbstractMesh) -> Any | None:
    """Returns the device description of an abstract mesh, or None where it has none.

    `jax.sharding.get_abstract_mesh` shows a concrete mesh made current by `jax.set_mesh`, too.
    """
    # AbstractMesh.abstract_device is public from 0.12; 0.10 has it undocumented (drop with 0.11).
    return getattr(mesh, "abstract_device", None)


def platforms_of(context: Any) -> tuple[str, ...]:
    """Returns the platforms that a primitive's lowering rule lowers for, by JAX's names: `cpu`, `cuda`, `tpu`."""
    # 0.10 … 0.12: the context's own are those of a branch of lax.platform_dependent, else the module's count.
    platforms: tuple[str, ...] = tuple(context.platforms or context.module_context.platforms)
    return platforms


def _identity(array: Any, **_params: Any) -> Any:
    return array


def is_forward_mode_of_custom_vjp(error: TypeError) -> bool:
    """Whether JAX raised it because a function with a `custom_vjp` is differentiated in forward mode."""
    # 0.10 … 0.12 tell it from other TypeErrors by its text alone.
    return str(error).startswith("can't apply forward-mode autodiff (jvp) to a custom_vjp function")


@final
class Marker:
    """A linear primitive that is the identity and leaves no operation in a program: it says how an array is used.

    There is no public way to tell forward from reverse mode, or to learn for what a program is lowered.

    Args:
      name: the primitive's. lower: its lowering rule. transpose: its rule in reverse mode.
      evaluate: what it does outside of programs.
    """

    def __init__(
        self,
        name: str,
        lower: Callable[..., list[Any]],
        transpose: Callable[..., list[Any]],
        evaluate: Callable[..., Any] = _identity,
    ) -> None:
        self._primitive = _Primitive(name)
        self._primitive.def_impl(evaluate)
        self._primitive.def_abstract_eval(_identity)
        batching.primitive_batchers[self._primitive] = self._vectorised
        mlir.register_lowering(self._primitive, lower)
        ad.deflinear2(self._primitive, transpose)  # type: ignore[no-untyped-call]

    def bind(self, array: Any, **params: Any) -> Any:
        """Returns the array, marked."""
        return self._primitive.bind(array, **params)

    def _vectorised(self, arrays: Any, dims: Any, **params: Any) -> tuple[Any, Any]:
        return self.bind(arrays[0], **params), dims[0]


def array_shapes(program: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of the arrays that a jaxpr and all inside it hold; a scalar that is written into it is none."""
    from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # elsewhere nothing of it is needed

    # Public are a jaxpr's text and its evaluation; the classes are in jax.extend. One class from 0.12.
    if isinstance(program, ClosedJaxpr | Jaxpr):
        yield from (np.shape(array) for array in getattr(program, "consts", ()))
        for equation in program.eqns:
            literals = (operand.val for operand in equation.invars if isinstance(operand, Literal))
            yield from (np.shape(value) for value in literals if np.shape(value))
            for inside in jax.tree.leaves(equation.params):
                yield from array_shapes(inside)
