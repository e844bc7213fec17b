"""The golden cases: each written in kernelry's words, and kernelry's answer to it, computed once.

The arrays in `goldens` come from AttentionOp of MaxText 0.2.5 on CPU in float32; `_format` in
`goldens/manifest.json` explains them. A test asks for `case` and is run for every case that its
marker `cases` selects; `answer` is what kernelry says to it through its public names.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks, moba
from kernelry.storage import QuantizedArray

_FOLDER = pathlib.Path(__file__).parent / "goldens"
_OPERANDS = ("q", "k", "v", "sinks")
_ACTIVE = 1  # the segment id of a cache slot in use
_COMPILE_FAST = {"xla_backend_optimization_level": 0}  # arrays are tiny: compiling is all the time, and this halves it


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One golden case: what was asked of MaxText, with which arrays, and what it answered."""

    name: str
    params: Mapping
    arrays: Mapping[str, np.ndarray]

    @property
    def is_decode(self):
        return self.params["model_mode"] == "autoregressive"

    @property
    def parts(self):
        """The suffixes of the arrays of each cache; one empty suffix where keys are in one piece."""
        return ("_prefill", "_ar") if "k_prefill" in self.arrays else ("",)

    @property
    def offset(self):
        """Position of the first query of a chunked prefill."""
        return self.params["previous_chunk_len"] or 0

    @property
    def cotangent(self):
        """The weights of the output in the sum that was differentiated: float64 angles, rounded last."""
        out = self.arrays["out"]
        return np.cos(0.37 * np.arange(out.size)).astype(np.float32).reshape(out.shape)

    def lse(self, part=""):
        """MaxText's running maximum and sum as log Σ exp(logits), [B, N, T]."""
        maximum, total = self.arrays[f"out_max{part}"], self.arrays[f"out_sum{part}"]
        return (maximum + np.log(total))[..., 0].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What kernelry says: the output, a Partial for each part of the keys, gradients where the case has them."""

    out: np.ndarray
    partials: Mapping[str, kernelry.Partial]
    max_logits: np.ndarray
    gradients: Mapping[str, np.ndarray]


def _positional(params):
    match params["attention_type"]:
        case "local_sliding":
            return masks.SlidingWindow(params["sliding_window_size"] - 1)
        case "chunk":
            return masks.Chunked(params["chunk_attn_window_size"])
        case "block_diffusion":
            return masks.BlockCausal(params["causal_block_size"])
        case "global" | "mla":
            return masks.Causal()


def _structure(case, arrays, part=""):
    """What attention type, packing and image spans show: the case's own `mask`, before indexer and MoBA."""
    if case.params["kernel"] == "ragged":
        return masks.Lengths(arrays["lengths"])
    ids = arrays[f"segment_ids{part}"]
    if case.is_decode:
        return _cache_slots(case, arrays, ids, part)
    queries = slice(case.offset, case.offset + case.params["T"])
    positional = _positional(case.params)
    if case.offset:
        mask = positional.at(query_offset=case.offset) & masks.Segments(ids[:, queries], ids)
    else:
        mask = positional & masks.Segments(ids)
    if "bidirectional_mask" in arrays:
        mask = mask | masks.BidirectionalSpans.from_flags(arrays["bidirectional_mask"] > 0)
    return mask


def _cache_slots(case, arrays, ids, part):
    """Slots in use; under a window those that stand near the query, the newest key of the second cache."""
    mask = masks.Segments(np.full((case.params["B"], 1), _ACTIVE), ids)
    if case.params["attention_type"] == "global":
        return mask
    prefilled = case.params["P"]
    starts = {"_prefill": 0, "_ar": prefilled}
    return mask & _positional(case.params).at(query_offset=prefilled + arrays["lengths"] - 1, kv_offset=starts[part])


def _mask(case, arrays, part=""):
    """Everything that the case hides."""
    mask = _structure(case, arrays, part)
    if "indexer_keep" in arrays:
        keep = arrays["indexer_keep"][:, None] > 0
        split = case.params.get("P")
        mask &= masks.Dense({"": keep, "_prefill": keep[..., :split], "_ar": keep[..., split:]}[part])
    if case.params["moba"]:
        positions = case.offset + np.arange(case.params["T"])
        chunk_size, top_k = case.params["moba"]["chunk_size"], case.params["moba"]["topk"]
        mask &= moba.select_blocks(
            arrays["q"], arrays["k"], chunk_size=chunk_size, top_k=top_k, query_positions=positions
        )
    return mask


def _cached(case, arrays, name):
    if not case.params["kv_quant"]:
        return arrays[name]
    values = arrays[f"{name}_q"].astype(case.params["kv_quant"]["dtype"])  # NumPy's files hold int4 as int8
    return QuantizedArray(values, arrays[f"{name}_scale"])


def _attend(case, arrays, part, mask=None, **options):
    return kernelry.attention(
        arrays["q"],
        _cached(case, arrays, f"k{part}"),
        _cached(case, arrays, f"v{part}"),
        mask=_mask(case, arrays, part) if mask is None else mask,
        scale=case.params["scale"],
        soft_cap=case.params["attn_logits_soft_cap"],
        mode=case.params["model_mode"],
        **options,
    )


def _partials(case, arrays, **options):
    options |= {"return_partial": True, "return_max_logits": True}
    found = {part: _attend(case, arrays, part, **options) for part in case.parts}
    return {part: partial for part, (partial, _) in found.items()}, jnp.stack([top for _, top in found.values()])


def _merged(case, arrays, **options):
    """The output over all caches, and the largest logits."""
    partials, max_logits = _partials(case, arrays, **options)
    return kernelry.finalize(kernelry.merge(list(partials.values())), arrays.get("sinks")), max_logits.max(axis=0)


def _compute(case, arrays):
    partials, max_logits = _partials(case, arrays)
    if len(case.parts) > 1:
        out = kernelry.finalize(kernelry.merge(list(partials.values())), arrays.get("sinks"))
        return Answer(out, partials, max_logits.max(axis=0), {})
    operands = {name: arrays[name] for name in _OPERANDS if name in arrays}
    attend = functools.partial(_with_operands, case, arrays)
    if not case.params["has_grads"]:
        return Answer(attend(operands), partials, max_logits[0], {})
    out, pull = jax.vjp(attend, operands)
    (gradients,) = pull(jnp.asarray(case.cotangent))
    return Answer(out, partials, max_logits[0], {f"d{name}": gradient for name, gradient in gradients.items()})


def _with_operands(case, arrays, operands):
    arrays = {**arrays, **operands}
    return _attend(case, arrays, "", sinks=arrays.get("sinks"))


@functools.cache
def _manifest():
    return json.loads((_FOLDER / "manifest.json").read_text())


@functools.cache
def _case(name):
    described = next(entry for entry in _manifest()["cases"] if entry["name"] == name)
    with np.load(_FOLDER / described["file"]) as stored:
        return Case(name, described["params"], dict(stored))


@functools.cache
def _answer(name):
    """kernelry's answer in NumPy, from one jitted program."""
    case = _case(name)

    def program(arrays):
        answer = _compute(case, arrays)
        return {field.name: getattr(answer, field.name) for field in dataclasses.fields(Answer)}

    return Answer(**jax.tree.map(np.asarray, jax.jit(program, compiler_options=_COMPILE_FAST)(case.arrays)))


def pytest_configure(config):
    config.addinivalue_line("markers", "cases(predicate): the golden cases a test is about, by their manifest entry")


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("cases")
    chosen = [entry["name"] for entry in _manifest()["cases"] if marker is None or marker.args[0](entry)]
    assert chosen, f"{metafunc.function.__name__} selects no golden case"
    metafunc.parametrize("case", chosen, indirect=True)


@pytest.fixture
def case(request):
    return _case(request.param)


@pytest.fixture
def answer(case):
    return _answer(case.name)


@pytest.fixture
def structure():
    """(case, arrays, part="") -> the mask before indexer and MoBA."""
    return _structure


@pytest.fixture
def attend():
    """(case, arrays, part, mask=None, **options) -> attention over one part of the keys."""
    return _attend


@pytest.fixture
def merged():
    """(case, arrays, **options) -> the output over all caches, each attended to by itself, and the largest logits."""
    return _merged


@pytest.fixture
def goldens():
    """The folder of the golden cases and its manifest."""
    return _FOLDER, _manifest()
