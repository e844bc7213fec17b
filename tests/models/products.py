"""Calls of attention in models whose code has no function for it.

They are found by the products around each softmax, or as PyTorch's own attention.
"""

import contextlib
import sys

import numpy as np
from capture import Call

BIASES = ("build_alibi_tensor", "build_mpt_alibi_tensor", "compute_position_bias")
"""The functions of transformers that make what is added to the logits."""
BATCH = 2
"""Sequences of the inputs: some of the code joins them with the heads."""


@contextlib.contextmanager
def recording_products(calls, rotations):
    """Appends a call for each softmax between two products, while the context is open.

    Args:
      calls: the list that grows; a call's `more` has its logits, and the bias that was made for the model.
      rotations: the count of rotations of queries and keys since the last call.
    """
    biases = []
    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("transformers.models."):
                _wrap_biases(stack, module, biases)
        stack.enter_context(_mode(calls, rotations, biases))
        yield


def _wrap_biases(stack, module, biases):
    for owner in [module, *(each for each in vars(module).values() if isinstance(each, type))]:
        for name in set(BIASES) & set(vars(owner)):
            make = vars(owner)[name]
            stack.callback(setattr, owner, name, make)
            setattr(owner, name, _keeping(make, biases))


def _keeping(make, biases):
    def made(*args, **kwargs):
        bias = make(*args, **kwargs)
        biases[:] = [bias.numpy()]
        return bias

    return made


def _mode(calls, rotations, biases):
    from torch.overrides import TorchFunctionMode

    class Products(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.product = None
            self.waiting = None

        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            name = getattr(func, "__name__", "")
            if name == "scaled_dot_product_attention":
                calls.append(_fused(args, kwargs or {}, result, rotated=rotations[0] > 0, biases=biases))
                rotations[0] = 0
            elif name == "softmax" and self.product is not None and args[0].numel() == self.product[2]:
                self.waiting = (*self.product[:2], args[0].clone())
            elif name in ("matmul", "__matmul__", "bmm", "baddbmm"):
                self.multiplied(*_operands(name, args, kwargs or {}), result)
            return result

        def multiplied(self, first, second, result):
            if self.waiting is None:
                self.product = (first.clone(), second.clone(), result.numel())
                return
            calls.append(_call(*self.waiting, second, result, rotated=rotations[0] > 0, biases=biases))
            rotations[0] = 0
            self.product = self.waiting = None

    return Products()


def _operands(name, args, kwargs):
    if name == "baddbmm":
        return tuple(kwargs[key] for key in ("batch1", "batch2")) if "batch1" in kwargs else args[1:3]
    return args[:2]


def _call(query, key, logits, value, out, *, rotated, biases):
    """A call from the operands of both products: [.., T, H], [.., H, S], [.., T, S] and [.., S, D]."""
    query, key, logits, value, out = (
        array.reshape(BATCH, -1, *array.shape[-2:]).numpy() for array in (query, key.mT, logits, value, out)
    )
    return Call(
        layer=None,
        module="",
        **{name: array.swapaxes(1, 2) for name, array in (("query", query), ("key", key), ("value", value))},
        out=out.swapaxes(1, 2),
        mask=np.where(logits > -1e4, 0.0, -np.inf),
        scale=None,
        rotated=rotated,
        more={"logits": logits, **({"bias": biases[0]} if biases else {})},
    )


def _fused(args, kwargs, out, *, rotated, biases):
    """A call of PyTorch's own attention with an additive mask and its default scale."""
    query, key, value = args[:3]
    mask = kwargs["attn_mask"]
    repeats = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(repeats, 1).mT * query.shape[-1] ** -0.5 + mask
    return _call(query, key.mT, logits, value, out, rotated=rotated, biases=biases)


def fitted_scale(call, bias):
    """The factor on the products of a call's queries and keys, by least squares over the logits that are seen."""
    groups = call.query.shape[2] // call.key.shape[2]
    products = np.einsum("btnh,bsnh->bnts", call.query, call.key.repeat(groups, axis=2))
    seen = call.more["logits"] > -1e4
    wanted = np.where(seen, call.more["logits"] - bias, 0)
    return float((wanted * products).sum() / (products**2 * seen).sum())
