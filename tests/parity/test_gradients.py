"""Gradients of Σ out · cotangent equal MaxText's."""

import numpy as np
import pytest

_TOLERANCE = {"rtol": 0, "atol": 5e-5}


@pytest.mark.cases(lambda entry: entry["params"]["has_grads"])
def test_gradients_exist_for_every_gradient_of_the_golden(case, answer):
    assert answer.gradients.keys() == case.arrays.keys() & {"dq", "dk", "dv", "dsinks"}


# In train_fully_masked_rows the uniform weights of masked rows add to dv: see test_differences.
@pytest.mark.cases(lambda entry: entry["params"]["has_grads"] and "fully_masked" not in entry["tags"])
def test_gradients_equal_the_golden(case, answer):
    for name, gradient in answer.gradients.items():
        np.testing.assert_allclose(gradient, case.arrays[name], **_TOLERANCE, err_msg=name)
