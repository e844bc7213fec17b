"""Every layer of tiny random models of transformers, reproduced from their configs alone."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capture import LENGTH, capture, content_of, tiny_config, tiny_model, tiny_options
from model_cases import CASES, SPLASH
from products import fitted_scale

import kernelry
from kernelry import masks
from kernelry.errors import ConfigError
from kernelry.models import from_huggingface
from kernelry.models.families import families, text_families
from kernelry.testing import interpret

pytestmark = pytest.mark.models


def inputs_of(case):
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 120, (2, LENGTH), generator=generator)
    return case.inputs(ids) if case.inputs else {"input_ids": ids}


@functools.cache
def calls_and_model(case):
    """What transformers calls, and the model of the same content.

    Of the content that it would write, which has the keys of its release, the model is the same.
    """
    options = tiny_options(case.model_type, case.options)
    config = tiny_config(options)
    model = from_huggingface(options)
    assert with_scales(from_huggingface(content_of(config))) == with_scales(model)
    made = {name: getattr(case, name) for name in ("gain", "dtype", "implementation", "class_name")}
    with case.building():
        network = tiny_model(config, **made)
    return capture(network, products=case.products, ignored=case.ignored, **inputs_of(case)), model


def with_scales(model):
    """The kinds of a model, as text, where a scale is always said."""
    kinds = (
        dataclasses.replace(kind, config=dataclasses.replace(kind.config, scale=scale_of(kind.config)))
        for kind in model.kinds
    )
    return [str(kind) for kind in kinds]


def scale_of(config):
    return config.head_dim**-0.5 if config.scale is None else config.scale


@functools.cache
def calls_by_kind(case):
    """Pairs of a kind of layers and its calls, each with the number of its layer."""
    calls, model = calls_and_model(case)
    others = {layer for other in model.others for layer in other.layers}
    counts = collections.Counter()
    found = {}
    for call in calls:
        stack = case.stack_of(call) if case.stack_of else ""
        if case.in_order or call.layer is None:
            described = sorted({layer for kind in of_stack(model, stack) for layer in kind.layers})
            layer = described[counts[stack] // case.calls_per_layer]
        elif (layer := case.layer_of(call.layer)) in others:
            continue
        counts[stack] += 1
        kind = model.of_layer(layer, stack)
        found.setdefault(kind.name, (kind, []))[1].append((layer, in_groups(call, kind)))
    return list(found.values())


def in_groups(call, kind):
    """A call whose keys and values were repeated for each query head, with the heads that its kind says."""
    repeats, rest = divmod(call.key.shape[2], kind.config.kv_heads)
    if repeats < 2 or rest:
        return call
    fewer = {name: getattr(call, name)[:, :, ::repeats] for name in ("key", "value")}
    for name, array in fewer.items():
        np.testing.assert_array_equal(getattr(call, name), np.repeat(array, repeats, axis=2))
    return dataclasses.replace(call, **fewer)


def of_stack(model, stack):
    return [kind for kind in model.kinds if kind.name.startswith(stack)]


def together(kind, calls):
    """The calls of a kind as one, of a larger batch; sinks and biases, which a batch shares, keep them apart."""
    if kind.config.sinks or kind.config.bias:
        return [[pair] for pair in calls]
    return [calls]


def arrays_of(calls):
    joined = (np.concatenate([getattr(call, name) for _, call in calls]) for name in ("query", "key", "value", "out"))
    query, key, value, out = joined
    return (jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)), out


def attend(calls, kind, case, **options):
    """How far the output of kernelry for the arrays of calls is off, with what the kind says and nothing else."""
    config = kind.config
    call = calls[0][1]
    sinks = sinks_of(call)
    arrays, out = arrays_of(calls)
    found = np.asarray(
        kernelry.attention(
            *arrays,
            mask=mask_of(kind, case),
            scale=config.scale,
            soft_cap=config.soft_cap,
            sinks=jnp.asarray(sinks).reshape(-1)[: config.q_heads] if config.sinks else None,
            bias=jnp.asarray(case.bias(call)) if config.bias else None,
            logits_dtype=arrays[0].dtype,
            **options,
        )
    )
    assert found.dtype == out.dtype
    return np.abs(found - out.reshape(found.shape)).max()


def sinks_of(call):
    return next((call.more[name] for name in ("s_aux", "sinks") if call.more.get(name) is not None), None)


def mask_of(kind, case):
    """The mask of a kind, with the tokens that see each other."""
    if kind.bidirectional is None:
        return kind.config.mask
    return kind.config.mask | masks.BidirectionalSpans.from_flags(case.marked)


def passed_scale(call, case):
    """The scale that transformers passed, or the one that its logits have."""
    if case.products:
        return fitted_scale(call, case.bias(call) if case.bias else 0)
    return call.query.shape[3] ** -0.5 if call.scale is None else float(call.scale)


def check_facts(layer, call, kind, case):
    """Says which fact of the table differs from what transformers does."""
    config = kind.config
    N, K, H, D = call.query.shape[2], call.key.shape[2], call.query.shape[3], call.value.shape[3]
    seen = np.asarray(mask_of(kind, case).materialize(call.query.shape[1], call.key.shape[1]))[0, 0]
    digits = 5 if case.products else 6
    ours = {
        "q_heads": config.q_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "value_dim": config.value_dim,
        "scale": round(scale_of(config), digits),
        "soft_cap": config.soft_cap,
        "sinks": config.sinks,
        "rope": kind.rope,
        "mask": rows_of(seen),
    }
    theirs = {
        "q_heads": N,
        "kv_heads": K,
        "head_dim": H,
        "value_dim": D,
        "scale": round(passed_scale(call, case), digits),
        "soft_cap": call.more.get("softcap"),
        "sinks": sinks_of(call) is not None,
        "rope": call.rotated,
        "mask": rows_of(call.visible),
    }
    changed = [f"{name} is {ours[name]} here, {theirs[name]} there" for name in ours if ours[name] != theirs[name]]
    assert not changed, f"layer {layer} ({kind.name}): facts that differ from transformers: {'; '.join(changed)}"
    assert np.array_equal(seen, call.visible), f"layer {layer} ({kind.name}): the masks differ:\n{call.visible * 1}"


def rows_of(visible):
    """Which keys each query sees, briefly."""
    first, last = visible.argmax(1), visible.shape[1] - 1 - visible[:, ::-1].argmax(1)
    rows = np.arange(len(visible))
    return f"{(rows - first).max()} keys before, {(last - rows).max()} after, {visible.sum()} in all"


def check_shared(kinds):
    """Keys are those of the layer that the table names, and of no other layer."""
    keys = {layer: call.key for _, calls in kinds for layer, call in calls}
    shared = {pair for kind, _ in kinds for pair in kind.shared_kv}
    found = {
        (after, before)
        for after, before in itertools.permutations(keys, 2)
        if before < after and np.array_equal(keys[after], keys[before])
    }
    sources = dict(shared)
    alike = {(a, b) for a in keys for b in keys if b < a and sources.get(a, a) == sources.get(b, b)}
    assert found == alike, f"layers with the keys of earlier ones: {sorted(found)} there, {sorted(alike)} here"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layer_is_reproduced_from_the_config_alone(case):
    _, model = calls_and_model(case)
    kinds = calls_by_kind(case)
    called = collections.Counter((kind.name, layer) for kind, members in kinds for layer, _ in members)
    described = {(kind.name, layer): case.calls_per_layer for kind in model.kinds for layer in kind.layers}
    assert called == described, str(model)
    for kind, members in kinds:
        for layer, call in members:
            check_facts(layer, call, kind, case)
    if case.calls_per_layer == 1 and not case.stack_of:
        check_shared(kinds)
    for kind, members in kinds:
        for some in together(kind, members):
            for kernel in ("dot_product", "blockwise") if case.dtype == "float32" else ("dot_product",):
                with jax.enable_x64(case.dtype == "float64"):
                    off = attend(some, kind, case, kernel=kernel)
                assert off <= case.tolerance, f"layers {[layer for layer, _ in some]} ({kind.name}), {kernel}: {off}"


def is_default(kind, causal, call):
    """Whether a kind says nothing but what kernelry does by default, for the lengths of a call."""
    lengths = call.query.shape[1], call.key.shape[1]
    config = kind.config
    same_scale = config.scale is None or np.isclose(config.scale, config.head_dim**-0.5)
    same_mask = np.array_equal(config.mask.materialize(*lengths), causal.materialize(*lengths))
    return same_scale and same_mask and not (config.sinks or config.bias or config.soft_cap)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_defaults_would_be_wrong_where_the_table_says_otherwise(case):
    for kind, members in calls_by_kind(case):
        arrays, out = arrays_of(members)
        causal = masks.Causal().at(query_offset=arrays[1].shape[1] - arrays[0].shape[1])
        if is_default(kind, causal, members[0][1]):
            continue
        default = np.asarray(kernelry.attention(*arrays, mask=causal, kernel="dot_product"))
        off = np.abs(default - out.reshape(default.shape)).reshape(len(members), -1).max(1)
        assert off.min() > 100 * case.tolerance, f"{kind.name}: the defaults are off by {off} only"


@pytest.mark.parametrize("case", SPLASH, ids=str)
def test_splash_reproduces_them_in_interpret_mode(case):
    with interpret():
        for kind, members in calls_by_kind(case):
            for some in together(kind, members):
                off = attend(some[:1], kind, case, kernel="splash")
                assert off <= case.tolerance, f"{kind.name}: {off}"


def test_every_row_that_describes_a_layer_has_a_case():
    tried = {case.model_type for case in CASES}
    tried |= {part["model_type"] for case in CASES if "model_type" in (part := case.options.get("text_config", {}))}
    described = {name for name in families() if name in tried or readable({"model_type": name})}
    without = {*described, *text_families()} - tried
    assert not without, f"rows of the table that no case reproduces: {sorted(without)}"


def readable(content):
    try:
        from_huggingface(content)
    except ConfigError:
        return False
    return True
