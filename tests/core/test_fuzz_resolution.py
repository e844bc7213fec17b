"""Random requests and configs, valid and absurd: only kernelry's own errors come out, each with a reason."""

import logging

import pytest
from fuzzing import fuzz, fuzz_configs


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("kernelry").setLevel(logging.ERROR)
    yield
    logging.getLogger("kernelry").setLevel(logging.NOTSET)


def test_random_requests_are_answered():
    outcomes = fuzz(300, seed=0)
    assert all(outcomes.values()), outcomes


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1, 5))
def test_twenty_thousand_random_requests_are_answered(seed):
    outcomes = fuzz(5_000, seed)
    assert sum(outcomes.values()) == 5_000
    assert all(count > 1000 for count in outcomes.values()), outcomes


def test_random_configs_are_read_or_refused():
    assert len(fuzz_configs(100, seed=0)) == 4  # made and read from mappings, taken and refused


@pytest.mark.fuzz
def test_two_thousand_random_configs_are_read_or_refused():
    outcomes = fuzz_configs(2_000, seed=1)
    assert all(count > 400 for count in outcomes.values()), outcomes
