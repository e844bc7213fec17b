"""The golden cases are complete, unchanged, and asked of kernelry in full."""

import hashlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from kernelry.storage import Quantization, QuantizedArray

_ASKED = {
    "model_mode",
    "attention_type",
    "scale",
    "sliding_window_size",
    "chunk_attn_window_size",
    "causal_block_size",
    "attn_logits_soft_cap",
    "previous_chunk_len",
    "moba",
    "kernel",  # `ragged` sees the first `lengths` keys, `dot_product` what the mask says
}
_SHAPES = {"B", "T", "S", "P", "A", "Hq", "Hkv", "D", "Dv"}  # the arrays say them, too
_ABOUT_THE_CASE = {"has_grads", "record_max_logits", "kv_quant"}
_HOW_FAST = {"compute_axis_order", "reshape_q", "ragged_block_size"}  # layouts and blocks: no other answer
_NEUTRAL = {"dtype": "float32", "float32_logits": False, "float32_qk_product": False}
_INPUTS = {"q", "k", "v", "sinks", "segment_ids", "lengths", "bidirectional_mask", "indexer_keep"}
_ANSWERS = {"out", "out_unnorm", "out_max", "out_sum", "out_dot", "mask", "max_logits", "dq", "dk", "dv", "dsinks"}
_AXES = {"dkv": "head_dim", "heads_and_dkv": "heads_and_head_dim"}
_SUFFIX = re.compile("(_prefill|_ar)?(_q|_scale)?$")  # of a cache, and of its quantised form


def test_goldens_are_twenty_cases_ten_of_them_with_gradients(goldens):
    _, manifest = goldens
    assert len(manifest["cases"]) == 20
    assert sum(entry["params"]["has_grads"] for entry in manifest["cases"]) == 10


def test_goldens_folder_holds_what_the_manifest_lists(goldens):
    folder, manifest = goldens
    assert sorted(path.name for path in folder.glob("*.npz")) == sorted(entry["file"] for entry in manifest["cases"])


def test_golden_file_has_the_checksum_of_its_manifest_entry(case, goldens):
    folder, manifest = goldens
    (entry,) = (entry for entry in manifest["cases"] if entry["name"] == case.name)
    assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def test_golden_arrays_have_the_shapes_of_their_manifest_entry(case, goldens):
    _, manifest = goldens
    (entry,) = (entry for entry in manifest["cases"] if entry["name"] == case.name)
    found = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in case.arrays.items()}
    assert found == entry["arrays"]


def test_no_parameter_of_a_case_is_dropped(case):
    asked = case.params.keys() - _SHAPES - _ABOUT_THE_CASE - _HOW_FAST
    assert asked <= _ASKED | _NEUTRAL.keys()
    assert {name: case.params[name] for name in _NEUTRAL} == _NEUTRAL


def test_no_array_of_a_case_is_dropped(case):
    assert {_SUFFIX.sub("", name) for name in case.arrays} <= _INPUTS | _ANSWERS


@pytest.mark.cases(lambda entry: entry["params"]["kv_quant"])
def test_quantised_cases_store_every_key_and_value_quantised(case):
    held = {f"{name}{part}_{kind}" for name in "kv" for part in case.parts for kind in ("q", "scale")}
    assert held <= case.arrays.keys()


@pytest.mark.cases(lambda entry: entry["params"]["kv_quant"])
def test_maxtexts_scales_and_values_are_those_that_quantize_makes(case):
    how = Quantization(case.params["kv_quant"]["dtype"], _AXES[case.params["kv_quant"]["axis"]])
    for name in (f"{letter}{part}" for letter in "kv" for part in case.parts):
        array, values, scale = (case.arrays[f"{name}{kind}"] for kind in ("", "_q", "_scale"))
        found = QuantizedArray.quantize(jnp.asarray(array), how, scale_dtype=jnp.float32)
        np.testing.assert_array_equal(np.asarray(found.scale), scale)
        distance = np.abs(np.asarray(found.values).astype(int) - values)
        differs = distance > 0
        # The largest magnitude is scale · 127.5 by definition, and the last bit of a division decides where that goes.
        np.testing.assert_allclose((np.abs(array) / scale)[differs], {"int8": 127.5, "int4": 7.5}[how.dtype], rtol=1e-6)
        assert differs.mean() < 0.02
        assert distance.max() == 1


def test_golden_answer_is_computed_by_an_installed_kernel(case, answer):
    assert answer.out.shape == case.arrays["out"].shape
    assert set(answer.partials) == set(case.parts)
    assert bool(answer.gradients) == case.params["has_grads"]
