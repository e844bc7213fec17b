"""Every layer of tiny random models of transformers, reproduced from their configs alone."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from capture import LENGTH, capture, content_of, tiny_config, tiny_model
from model_cases import CASES, SPLASH

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
    calls = capture(tiny_model(config, gain=case.gain, dtype=case.dtype), **inputs_of(case))
    return calls, from_huggingface(content_of(config))


def kinds_of(calls, model, case):
    """Pairs of a call and the kind of its layer."""
    counts = collections.Counter()
    for call in calls:
        stack = case.stack_of(call) if case.stack_of else ""
        layer = counts[stack] // case.calls_per_layer if call.layer is None or case.in_order else call.layer
        counts[stack] += 1
        yield call, model.of_layer(layer, stack)


def attend(call, kind, **options):
    """The output of kernelry for the arrays of a call, with what the kind says and nothing else."""
    config = kind.config
    sinks = next((call.more[name] for name in ("s_aux", "sinks") if call.more.get(name) is not None), None)
    return np.asarray(
        kernelry.attention(
            *(jnp.asarray(array) for array in (call.query, call.key, call.value)),
            mask=config.mask,
            scale=config.scale,
            soft_cap=config.soft_cap,
            sinks=jnp.asarray(sinks).reshape(-1)[: config.q_heads] if config.sinks else None,
            bias=bias_of(call) if config.bias else None,
            **options,
        )
    )


def bias_of(call):
    """What transformers adds to the logits, without the mask."""
    bias = call.more.get("position_bias")
    return jnp.asarray(np.where(call.mask > -1e4, call.mask, 0) if bias is None else bias)


def check_facts(call, kind):
    """Says which fact of the table differs from what transformers does."""
    config = kind.config
    N, K, H, D = call.query.shape[2], call.key.shape[2], call.query.shape[3], call.value.shape[3]
    seen = np.asarray(config.mask.materialize(call.query.shape[1], call.key.shape[1]))[0, 0]
    ours = {
        "q_heads": config.q_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "value_dim": config.value_dim,
        "scale": round(config.scale or config.head_dim**-0.5, 6),
        "soft_cap": config.soft_cap,
        "rope": kind.rope,
        "mask": kernelry_rows(seen),
    }
    theirs = {
        "q_heads": N,
        "kv_heads": K,
        "head_dim": H,
        "value_dim": D,
        "scale": round(H**-0.5 if call.scale is None else float(call.scale), 6),
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
        check_facts(call, kind)
        for kernel in ("dot_product", "blockwise"):
            if case.dtype == "float32" or kernel == "dot_product":
                found = attend(call, kind, kernel=kernel)
                difference = np.abs(found - call.out.reshape(found.shape)).max()
                assert difference <= case.tolerance, f"layer {call.layer} ({kind.name}), {kernel}: {difference}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_defaults_would_be_wrong_where_the_table_says_otherwise(case):
    calls, model = calls_and_model(case)
    for call, kind in kinds_of(calls, model, case):
        if kind.config.mask == masks.Causal() and kind.config.scale is None and not kind.config.sinks:
            continue
        arrays = (jnp.asarray(array) for array in (call.query, call.key, call.value))
        default = np.asarray(kernelry.attention(*arrays, mask=masks.Causal(), kernel="dot_product"))
        off = np.abs(default - call.out.reshape(default.shape)).max()
        assert off > 100 * case.tolerance, f"layer {call.layer} ({kind.name}): the defaults are off by {off} only"


@pytest.mark.parametrize("case", SPLASH, ids=str)
def test_splash_reproduces_them_in_interpret_mode(case):
    calls, model = calls_and_model(case)
    with interpret():
        for call, kind in kinds_of(calls, model, case):
            found = attend(call, kind, kernel="splash")
            assert np.abs(found - call.out.reshape(found.shape)).max() <= case.tolerance
