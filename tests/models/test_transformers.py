"""Every layer of tiny random models of transformers, reproduced from their configs alone."""

import collections
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from capture import LENGTH, capture, content_of, tiny_config, tiny_model
from model_cases import CASES, SPLASH
from products import fitted_scale

import kernelry
from kernelry import masks
from kernelry.models import from_huggingface
from kernelry.testing import interpret

pytestmark = pytest.mark.models


def inputs_of(case):
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 120, (2, LENGTH), generator=generator)
    return case.inputs(ids) if case.inputs else {"input_ids": ids}


def calls_and_model(case):
    config = tiny_config(case.model_type, **case.options)
    options = {name: getattr(case, name) for name in ("gain", "dtype", "implementation", "class_name")}
    model = tiny_model(config, **options)
    calls = capture(model, products=case.products, **inputs_of(case))
    return calls, from_huggingface(content_of(config))


def kinds_of(calls, model, case):
    """Pairs of a call and the kind of its layer."""
    counts = collections.Counter()
    for call in calls:
        stack = case.stack_of(call) if case.stack_of else ""
        layer = counts[stack] // case.calls_per_layer if call.layer is None or case.in_order else call.layer
        counts[stack] += 1
        yield in_groups(call, model.of_layer(layer, stack)), model.of_layer(layer, stack)


def in_groups(call, kind):
    """A call whose keys and values were repeated for each query head, with the heads that its kind says."""
    repeats, rest = divmod(call.key.shape[2], kind.config.kv_heads)
    if repeats < 2 or rest:
        return call
    fewer = {name: getattr(call, name)[:, :, ::repeats] for name in ("key", "value")}
    for name, array in fewer.items():
        np.testing.assert_array_equal(getattr(call, name), np.repeat(array, repeats, axis=2))
    return dataclasses.replace(call, **fewer)


def attend(call, kind, case, **options):
    """The output of kernelry for the arrays of a call, with what the kind says and nothing else."""
    config = kind.config
    sinks = next((call.more[name] for name in ("s_aux", "sinks") if call.more.get(name) is not None), None)
    return np.asarray(
        kernelry.attention(
            *(jnp.asarray(array) for array in (call.query, call.key, call.value)),
            mask=mask_of(kind, case),
            scale=config.scale,
            soft_cap=config.soft_cap,
            sinks=jnp.asarray(sinks).reshape(-1)[: config.q_heads] if config.sinks else None,
            bias=jnp.asarray(case.bias(call)) if config.bias else None,
            **options,
        )
    )


def mask_of(kind, case):
    """The mask of a kind, with the tokens that see each other."""
    if kind.bidirectional is None:
        return kind.config.mask
    return kind.config.mask | masks.BidirectionalSpans.from_flags(case.marked)


def scale_of(call, case):
    """The scale that transformers passed, or the one that its logits have."""
    if case.products:
        return fitted_scale(call, case.bias(call) if case.bias else 0)
    return call.query.shape[3] ** -0.5 if call.scale is None else float(call.scale)


def check_facts(call, kind, case):
    """Says which fact of the table differs from what transformers does."""
    config = kind.config
    N, K, H, D = call.query.shape[2], call.key.shape[2], call.query.shape[3], call.value.shape[3]
    seen = np.asarray(mask_of(kind, case).materialize(call.query.shape[1], call.key.shape[1]))[0, 0]
    ours = {
        "q_heads": config.q_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "value_dim": config.value_dim,
        "scale": round(config.scale or config.head_dim**-0.5, 5),
        "soft_cap": config.soft_cap,
        "rope": kind.rope,
        "mask": kernelry_rows(seen),
    }
    theirs = {
        "q_heads": N,
        "kv_heads": K,
        "head_dim": H,
        "value_dim": D,
        "scale": round(scale_of(call, case), 5),
        "soft_cap": call.more.get("softcap"),
        "rope": call.rotated,
        "mask": kernelry_rows(call.visible),
    }
    changed = [f"{name} is {ours[name]} here, {theirs[name]} there" for name in ours if ours[name] != theirs[name]]
    assert not changed, f"layer {call.layer} ({kind.name}): facts that differ from transformers: {'; '.join(changed)}"


def kernelry_rows(visible):
    """Which keys each query sees, briefly."""
    first, last = visible.argmax(1), visible.shape[1] - 1 - visible[:, ::-1].argmax(1)
    assert np.array_equal(visible.sum(1), last - first + 1), "a query sees keys with a gap"
    rows = np.arange(len(visible))
    return f"{(rows - first).max()} keys before, {(last - rows).max()} after, row sums {visible.sum()}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layer_is_reproduced_from_the_config_alone(case):
    calls, model = calls_and_model(case)
    described = sorted(layer for kind in model.kinds for layer in kind.layers)
    assert len(calls) == case.calls_per_layer * len(described), (len(calls), str(model))
    for call, kind in kinds_of(calls, model, case):
        check_facts(call, kind, case)
        for kernel in ("dot_product", "blockwise"):
            if case.dtype == "float32" or kernel == "dot_product":
                found = attend(call, kind, case, kernel=kernel)
                difference = np.abs(found - call.out.reshape(found.shape)).max()
                assert difference <= case.tolerance, f"layer {call.layer} ({kind.name}), {kernel}: {difference}"


def is_default(call, kind, causal):
    """Whether a kind says nothing but what kernelry does by default, for the lengths and heads of a call."""
    lengths = call.query.shape[1], call.key.shape[1]
    config = kind.config
    same_scale = config.scale is None or np.isclose(config.scale, config.head_dim**-0.5)
    same_mask = np.array_equal(config.mask.materialize(*lengths), causal.materialize(*lengths))
    return same_scale and same_mask and not (config.sinks or config.bias or config.soft_cap)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_defaults_would_be_wrong_where_the_table_says_otherwise(case):
    calls, model = calls_and_model(case)
    for call, kind in kinds_of(calls, model, case):
        causal = masks.Causal().at(query_offset=call.key.shape[1] - call.query.shape[1])
        if is_default(call, kind, causal):
            continue
        arrays = (jnp.asarray(array) for array in (call.query, call.key, call.value))
        default = np.asarray(kernelry.attention(*arrays, mask=causal, kernel="dot_product"))
        off = np.abs(default - call.out.reshape(default.shape)).max()
        assert off > 100 * case.tolerance, f"layer {call.layer} ({kind.name}): the defaults are off by {off} only"


@pytest.mark.parametrize("case", SPLASH, ids=str)
def test_splash_reproduces_them_in_interpret_mode(case):
    calls, model = calls_and_model(case)
    with interpret():
        for call, kind in kinds_of(calls, model, case):
            found = attend(call, kind, case, kernel="splash")
            assert np.abs(found - call.out.reshape(found.shape)).max() <= case.tolerance
