"""Random requests, valid and absurd, for the resolver."""

import math
import random

import kernelry
from kernelry import masks
from kernelry.errors import KernelryError

SPECS = tuple(kernel.spec for kernel in kernelry.kernels())

_SIZES = (0, 1, 2, 3, 7, 16, 64, 80, 127, 128, 200, 256, 1000, 1024, 4096, 2**20, 2**40)
_ABSURD = (-1, -(2**40), 1.5, math.nan, math.inf, "many", None, True, (), b"x", [3], {"a": 1})
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
