"""What `jax.checkpoint` computes again: the kernel calls in the program of a value and its gradients."""

import collections

import jax
from jax._src.ad_checkpoint import saved_residuals
from jax._src.interpreters import partial_eval

SAVED = jax.checkpoint_policies.save_only_these_names("context")
NOTHING = jax.checkpoint_policies.nothing_saveable

_WORK = ("pallas_call", "dot_general", "attention", "attn")
"""Parts of the names of primitives that do work: a Pallas kernel, a product, and those of cuDNN's attention."""


def calls(function, *arrays):
    """How often each primitive that does work is in the program of a function's value and gradients.

    What no result depends on is not counted, as far as JAX eliminates it; it never does that to a `pallas_call`.
    """
    program = jax.make_jaxpr(jax.value_and_grad(function, tuple(range(len(arrays)))))(*arrays).jaxpr
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return collections.Counter(_work(program))


def _work(program):
    for equation in program.eqns:
        name = equation.primitive.name
        if any(part in name for part in _WORK):
            yield name
        else:
            for parameter in equation.params.values():
                for each in parameter if isinstance(parameter, tuple | list) else [parameter]:
                    inside = getattr(each, "jaxpr", each)
                    if hasattr(inside, "eqns"):
                        yield from _work(inside)


def check(function, *arrays):
    """What has the name, once saved, is enough: no kernel runs again, as it does where nothing is saved."""
    wanted = calls(function, *arrays)
    assert calls(jax.checkpoint(function, policy=SAVED), *arrays) == wanted
    again = calls(jax.checkpoint(function, policy=NOTHING), *arrays)
    assert again > wanted, f"{again} is not more than {wanted}: saving would change nothing"


def saved(function, *arrays):
    """The shapes of what a policy that saves by name keeps, except for arguments and constants."""
    kept = saved_residuals(jax.checkpoint(function, policy=SAVED), *arrays)
    return sorted(kind.shape for kind, source in kept if "from the argument" not in source and "constant" not in source)
