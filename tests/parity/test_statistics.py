"""Statistics of each part equal MaxText's, whose maximum and sum are our lse in another form."""

import numpy as np
import pytest

_DIFFERS = {"train_fully_masked_rows", "ar_local_w8"}  # see test_differences
_TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.cases(lambda entry: entry["name"] not in _DIFFERS and "sinks" not in entry["arrays"])
def test_lse_equals_the_goldens_maximum_and_sum(case, answer):
    for part in case.parts:
        np.testing.assert_allclose(answer.partials[part].lse, case.lse(part), **_TOLERANCE)


@pytest.mark.cases(lambda entry: entry["name"] not in _DIFFERS and "decode" in entry["tags"])
def test_output_of_a_part_equals_the_goldens_unnormalised_output(case, answer):
    for part in case.parts:
        lse = answer.partials[part].lse.swapaxes(1, 2)[..., None]
        # Their numerator holds no sink, so that dividing it by exp(our lse) is right with sinks as well.
        wanted = case.arrays[f"out_unnorm{part}"] * np.exp(case.arrays[f"out_max{part}"] - lse)
        np.testing.assert_allclose(answer.partials[part].out, wanted, **_TOLERANCE)


@pytest.mark.cases(lambda entry: "sinks" in entry["arrays"])
def test_lse_of_maxtext_holds_the_sink_and_ours_does_not(case, answer):
    sinks = case.arrays["sinks"][None, :, None]
    holding = case.parts[0]  # the only part in training, the prefill part in decode
    ours = answer.partials[holding].lse
    np.testing.assert_allclose(np.logaddexp(ours, sinks), case.lse(holding), **_TOLERANCE)
    assert np.all(case.lse(holding) > ours)


@pytest.mark.cases(lambda entry: "sinks" in entry["arrays"] and "decode" in entry["tags"])
def test_lse_of_the_second_cache_holds_no_sink_on_either_side(case, answer):
    np.testing.assert_allclose(answer.partials["_ar"].lse, case.lse("_ar"), **_TOLERANCE)
