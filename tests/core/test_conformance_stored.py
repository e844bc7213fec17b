"""What the conformance kit gives a kernel that reads quantised keys or pages is what its oracle sees."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from honest_kernels import ALL, HONEST
from pairs import sweep_but

from kernelry import masks
from kernelry.plugin import Refusal, RefusalCode
from kernelry.storage import QUANTIZATIONS, PagedArray, QuantizedArray, ValueInKey
from kernelry.testing.conformance import Outcome, cases_of, run, run_case
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.stored import TABLE, as_given, quantized

WAYS = sorted(QUANTIZATIONS)
SEEN = np.array([13, 3], np.int32)
CALL = AttentionCall(kv_heads=2, mask=masks.Lengths(SEEN), page_size=4)
"""Row 1 sees nothing of three of its four pages."""
HIDDEN = np.broadcast_to(np.arange(16) >= SEEN[:, None], (2, 16))


def read(array):
    """Reads what a kernel is given with the storage types' own words."""
    stored = array.gather() if isinstance(array, PagedArray) else array
    return np.asarray(stored.dequantize() if isinstance(stored, QuantizedArray) else stored, np.float64)


# The step of five shares no factor with three sizes and two poisons: the kept cases have every size with and without.
EVERY_CALL = list(itertools.product([None, *WAYS], [None, 4, 16], [False, True]))


@pytest.mark.parametrize(("how", "page_size", "poison"), sweep_but(EVERY_CALL, *EVERY_CALL[::5]))
def test_what_rows_see_of_the_given_keys_is_what_the_oracle_sees(how, page_size, poison):
    call = dataclasses.replace(CALL, kv_quantization=how, page_size=page_size, poison=poison)
    _, *given = as_given(call.arrays())
    for name, array in zip(("key", "value"), given, strict=True):
        seen, known = read(array)[~HIDDEN], call.numbers()[name][~HIDDEN]
        np.testing.assert_allclose(seen, known, rtol=1e-6)
        assert np.isfinite(read(array)[HIDDEN]).any() == (not poison)


def test_the_table_is_in_no_order_and_lacks_pages_that_no_row_sees():
    table = np.asarray(CALL.arrays()[TABLE])
    assert (np.diff(table[table >= 0]) != 1).any()
    hidden_pages = HIDDEN.reshape(2, 4, 4).all(axis=2)
    assert 0 < (table < 0).sum() < hidden_pages.sum()
    assert not ((table < 0) & ~hidden_pages).any()


@pytest.mark.parametrize("how", [None, *WAYS])
def test_the_first_and_the_last_page_belong_to_nobody_and_are_nan(how):
    arrays = dataclasses.replace(CALL, kv_quantization=how).arrays()
    pages = arrays["key"].dequantize() if how else arrays["key"]
    assert np.isnan(np.asarray(pages)[[0, -1]]).all()
    assert not np.isin(np.asarray(arrays[TABLE]), [0, len(pages) - 1]).any()


@pytest.mark.parametrize("how", WAYS)
def test_the_kit_quantises_without_qwix_as_near_as_qwix_does(how):
    array = np.random.default_rng(0).standard_normal((2, 5, 2, 8))
    mine = quantized(array, how)
    assert str(mine.quantization) == how
    error, theirs = (
        np.abs(np.asarray(held.values, np.float64) * np.asarray(held.scale, np.float64) - array)
        for held in (mine, QuantizedArray.quantize(jnp.asarray(array, jnp.float32), how))
    )
    assert error.max() <= 1.5 * theirs.max()


def in_large_pages(request, environment):
    if request.page_size in (None, 16):
        return ()
    return (Refusal(RefusalCode.PAGES, "pages of 16 only"),)


def test_a_kernel_of_larger_pages_is_held_to_those():
    spec = dataclasses.replace(HONEST, refusals=in_large_pages)
    found = {case.name: run_case(case) for case in cases_of(spec, quick=True) if "pages" in case.name}
    assert {result.outcome for result in found.values()} == {Outcome.PASSED}
    assert not any(result.detail for result in found.values())


def test_what_is_not_declared_is_refused_and_served_through_adapters():
    can = dataclasses.replace(ALL, kv_quantizations=frozenset({"int8:head_dim"}), pages=False)
    spec = dataclasses.replace(HONEST, capabilities=can)
    cases = {case.name: case for case in cases_of(spec)}
    assert run_case(cases["refuses keys in pages"]).outcome is Outcome.REFUSED
    assert run_case(cases["refuses quantised keys: int4:head_dim"]).outcome is Outcome.REFUSED
    assert "refuses quantised keys: int8:head_dim" not in cases
    for name in ("through adapters: keys in pages", "through adapters: quantised keys: int4:head_dim"):
        result = run_case(cases[name])
        assert (result.outcome, result.detail) == (Outcome.PASSED, "through adapters")


def test_the_arrays_of_a_plain_call_are_as_before():
    arrays = AttentionCall().arrays()
    assert set(arrays) == {"query", "key", "value"}
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(arrays["query"], rng.standard_normal((2, 16, 4, 8)).astype(np.float32))
    assert all(isinstance(array, jax.Array) for array in arrays.values())


@pytest.mark.parametrize("layout", sweep_but(["separate", "interleaved", "value_in_key"], "interleaved"))
def test_a_kernel_that_reads_one_kind_of_pages_alone_is_tested_on_those(layout):
    def refusals(request, environment):
        return () if request.page_size else (Refusal(RefusalCode.PAGES, "keys and values are not in pages"),)

    can = dataclasses.replace(ALL, kv_layouts=frozenset({layout}))
    report = run(dataclasses.replace(HONEST, capabilities=can, refusals=refusals), quick=True)
    assert report.ok, [(case.name, case.detail) for case in report.failures]
    outcomes = [case.outcome for case in report.cases]
    assert outcomes.count(Outcome.PASSED) > 50
    others = {"separate", "interleaved", "value_in_key"} - {layout}
    refused = {case.name for case in report.cases if case.outcome is Outcome.REFUSED}
    assert {f"refuses kv_layout {other}" for other in others} <= refused


@pytest.mark.parametrize("layout", ["interleaved", "value_in_key"])
def test_values_with_the_keys_are_what_the_oracle_sees(layout):
    call = dataclasses.replace(CALL, kv_layout=layout, poison=True)
    _, key, value = as_given(call.arrays())
    assert (value, key.interleaved) == (ValueInKey(8), layout == "interleaved")
    found = key.gather_pair() if key.interleaved else (key.gather(), key.gather())
    for name, array in zip(("key", "value"), found, strict=True):
        np.testing.assert_array_equal(np.asarray(array)[~HIDDEN], call.numbers()[name][~HIDDEN])
        assert not np.isfinite(np.asarray(array)[HIDDEN]).any()
