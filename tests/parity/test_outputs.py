"""Outputs, masks and largest logits equal MaxText's. What differs on purpose is in test_differences."""

import numpy as np
import pytest

_DIFFERS = {
    "train_fully_masked_rows",  # rows that see nothing: 0 here, mean(value) there
    "ar_local_w8",  # the window of a decode step: around the query here, at the end of each cache there
}
_TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.cases(lambda entry: entry["name"] not in _DIFFERS)
def test_output_equals_the_golden(case, answer):
    np.testing.assert_allclose(answer.out, case.arrays["out"], **_TOLERANCE)


@pytest.mark.cases(lambda entry: "out_dot" in entry["arrays"])
def test_output_of_a_ragged_case_equals_that_of_the_dense_path(case, answer):
    np.testing.assert_allclose(answer.out, case.arrays["out_dot"], **_TOLERANCE)


@pytest.mark.cases(lambda entry: entry["params"]["kernel"] != "ragged" and entry["name"] != "ar_local_w8")
def test_mask_shows_what_the_golden_mask_shows(case, structure):
    for part in case.parts:
        wanted = case.arrays[f"mask{part}"].astype(bool)[:, None]
        found = structure(case, case.arrays, part).materialize(*wanted.shape[2:])
        np.testing.assert_array_equal(np.broadcast_to(found, wanted.shape), wanted)


@pytest.mark.cases(lambda entry: entry["params"]["record_max_logits"])
def test_max_logits_equal_the_golden(case, answer):
    np.testing.assert_allclose(answer.max_logits, case.arrays["max_logits"], **_TOLERANCE)
