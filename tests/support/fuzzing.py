"""Random requests and configs, valid and absurd."""

import collections
import dataclasses
import math
import random

import jax.numpy as jnp
import numpy as np

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig, load_config
from kernelry.errors import KernelryError

SPECS = tuple(kernel.spec for kernel in kernelry.kernels())

_SIZES = (0, 1, 2, 3, 7, 16, 64, 80, 127, 128, 200, 256, 1000, 1024, 4096, 2**20, 2**40)
_ABSURD = (
    *(-1, -(2**40), 10**400, 1.5, math.nan, math.inf, "many", "", "\0", None, True, b"x", object()),
    *((), [3], [[]], {"a": 1}, {1: 2}, {"a": {"b": "c"}}, {"a": {"b": 1, 3: 4}}, {1, 2}),
    *(np.arange(3), jnp.arange(3), jnp.int32(4), np.float32(2)),
)
_TARGETS = ("cpu", "gpu", "gpu:h100", "gpu:a100", "gpu:v100", "tpu", "tpu:v5e", "tpu:v5e:2x2", "tpu:v4")
_MASKS = (
    masks.Full(),
    masks.Causal(),
    masks.SlidingWindow(511),
    masks.SlidingWindow(3, 4).at(query_offset=5),
    masks.Chunked(64),
    masks.BlockCausal(8),
    masks.PrefixLM(3),
    masks.Segments([0, 0, 1]),
    masks.Segments([0, 0], [0, 1, 2]),
    masks.Lengths([3]),
    masks.Causal() & masks.Segments([0, 1]) & masks.Lengths([2]),
    (masks.Causal() & masks.Segments([0])) | masks.BidirectionalSpans([0]),
    ~masks.SlidingWindow(2, 2) & masks.Lengths([3]),
)
_CHOICES = {
    "target": _TARGETS,
    "mode": ("train", "prefill", "decode", "autoregressive"),
    "batch": _SIZES[:-1],
    "q_len": _SIZES,
    "kv_len": (None, *_SIZES),
    "q_heads": (1, 2, 4, 8, 32),
    "kv_heads": (None, 1, 2, 4),
    "head_dim": _SIZES[1:-2],
    "value_dim": (None, *_SIZES[1:-4]),
    "dtype": ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "int8"),
    "mask": _MASKS,
    "scale": (None, 1.0, 0.125, 0.0, -1.0),
    "bias": (None, (1, 1, 1, 1), (2, 4, 128, 128)),
    "soft_cap": (None, 30.0),
    "bias_after_cap": (False, True),
    "sinks": (False, True),
    "dropout_rate": (0.0, 0.1),
    "gradients": (None, (), ("query",), ("query", "key", "value", "bias", "sinks")),
    "normalization": ("softmax", "softmax_max_sum", "sigmoid"),
    "logits_dtype": ("float32", "bfloat16"),
    "precision": (None, "highest"),
    "partial": (False, True),
    "max_logits": (False, True),
    "interpret": (False, True),
    "kv_quantization": (None, "int8", "int4:heads_and_head_dim", "float8_e4m3fn", "int8:nothing"),
    "page_size": (None, *_SIZES[:8], 128),
    "kv_layout": ("separate", "value_in_key", "interleaved", "beside"),
    "context_parallel": (None, "ring:context:4", "all_gather:cp:2", "spiral:cp:2"),
}
_USUAL = {"q_len": 128, "head_dim": 64}


def random_facts(rng):
    """Draws the fields of a request; one in four requests has an absurd one."""
    names = rng.sample(sorted(_CHOICES), rng.randint(0, 9))
    facts = {**_USUAL, **{name: rng.choice(_CHOICES[name]) for name in names}}
    if rng.random() < 0.25:
        facts[rng.choice(sorted(_CHOICES))] = rng.choice(_ABSURD)
    return facts


def check(facts, kernel, rng):
    """Asks once; returns what came of it.

    Raises:
      AssertionError: anything but a KernelryError came out, a refusal lacks its reason, or the order of kernels
        decided.
    """
    request = _made(facts)
    return "no request" if request is None else _ask(request, kernel, rng)


def _made(facts):
    try:
        return kernelry.Request(**facts)
    except KernelryError as error:
        words = str(error)
    except Exception as error:
        raise AssertionError(f"Request({facts}) raised {error!r}") from error
    assert words, f"an error without a word for {facts}"
    return None


def _ask(request, kernel, rng):
    explained = kernelry.explain(request, kernel=kernel, kernels=SPECS)
    assert str(explained), "an explanation without a word"
    shuffled = tuple(rng.sample(SPECS, len(SPECS)))
    again = kernelry.explain(request, kernel=kernel, kernels=shuffled)
    assert again.to_json() == explained.to_json(), f"the order of kernels decides: {request}"
    for step in (step for candidate in explained.candidates for step in candidate.steps):
        checked = dataclasses.replace(step.after)  # what an adapter asks is not checked when it is made
        assert (checked, hash(checked)) == (step.after, hash(step.after)), f"{step.adapter.name} asks {step.after}"
    for candidate in explained.refused:
        assert all(str(refusal) for refusal in candidate.refusals)
    refusal = None
    try:
        kernelry.resolve(request, kernel=kernel, kernels=SPECS)
    except kernelry.errors.NoKernelError as error:
        refusal = error
    assert (explained.plan is None) == (refusal is not None)
    if refusal is None:
        return "served"
    assert refusal.resolution.candidates
    assert all(candidate.refusals for candidate in refusal.resolution.candidates), f"no reason: {request}"
    return "refused"


def fuzz(count, seed):
    """Asks `count` random questions; returns how many were served, refused, or no request at all."""
    rng = random.Random(seed)
    outcomes = {"served": 0, "refused": 0, "no request": 0}
    for _ in range(count):
        kernel = rng.choice(("auto", "auto", "splash", "pallas_mha", "dot_product", "nothing"))
        outcomes[check(random_facts(rng), kernel, rng)] += 1
    return outcomes


_OPTIONS = {
    "kernel": ("auto", "splash", "nothing"),
    "type": ("global", "local_sliding", "chunk", "full", "mla", "block_diffusion", "compressed", "globl"),
    "window": (None, 1, 512),
    "chunk_size": (None, 64),
    "block_size": (None, 8),
    "soft_cap": (None, 50.0),
    "scale": (None, 0.5, -1),
    "sinks": (False, True),
    "record_max_logits": (False, True),
    "dropout_rate": (0.0, 0.1, 1),
    "logits_dtype": ("float32", "bfloat16", "int8"),
    "precision": (None, "highest", "hi"),
    "thresholds": ({}, {"flash_min_q_len": 64}, {"flash": 3}),
    "forbid_adapters": ((), ["mask_to_bias"], ("expand_kv", "repeat")),
    "tilings": ({}, {"splash": {"block_q": 256}}, {"splash": {"block_q": 0}}),
}
_WHEN = {
    "platform": ("gpu", ["tpu", "cpu"], "gpuu"),
    "kind": ("h100", ["v5*"]),
    "mode": ("train", ["train", "prefill"]),
    "q_len": (128, ">=128", "128..1024", [1, "<4"], "9..1"),
    "dtype": ("bfloat16", "bf16"),
    "mask": ("causal", ["window", "segments"], "full"),
}
_RULE = {"use": ("auto", ["splash", "auto"], ["auto", "splash"]), "tiling": ({}, {"block_q": 64}, {"block_q": -1})}


def _drawn(choices, rng, absurd):
    names = rng.sample(sorted(choices), rng.randint(0, min(3, len(choices))))
    drawn = {name: rng.choice(choices[name]) for name in names}
    if rng.random() < absurd:
        drawn[rng.choice(sorted(choices))] = rng.choice(_ABSURD)
    return drawn


def _table(rng):
    table = _drawn(_OPTIONS, rng, absurd=0.3)
    if rng.random() < 0.5:
        rule = {"use": "auto", **_drawn(_RULE, rng, absurd=0.1), "when": _drawn(_WHEN, rng, absurd=0.2)}
        table["rules"] = [rule, rng.choice(_ABSURD)] if rng.random() < 0.1 else [rule]
    if rng.random() < 0.2:
        table["moba"] = {"chunk_size": rng.choice((4, *_ABSURD)), "top_k": rng.choice((2, *_ABSURD))}
    return table


def _outcome(make, given):
    try:
        config, again = make(given), make(given)
        assert hash(config) == hash(again), "two readings of one config differ"
        assert config.policy == again.policy
        assert config.mask.form == again.mask.form
        return "read"
    except KernelryError as error:
        words = str(error)
    except Exception as error:
        raise AssertionError(f"{given} raised {error!r}") from error
    assert words, f"an error without a word for {given}"
    return "refused"


def fuzz_configs(count, seed):
    """Makes `count` random configs in Python, and reads as many from mappings; returns how many were what."""
    rng = random.Random(seed)
    outcomes = collections.Counter()
    for _ in range(count):
        outcomes["made", _outcome(lambda given: AttentionConfig(**given), _drawn(_OPTIONS, rng, absurd=0.3))] += 1
        outcomes["mapping", _outcome(load_config, {"attention": _table(rng)})] += 1
    return outcomes
