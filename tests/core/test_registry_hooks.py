"""Votes and observers of plugins: heard, and isolated when they raise."""

import sys

import pytest

import kernelry


def test_vote_orders_the_candidates(shelf, install, fresh_request):
    shelf.put_kernel("second", "another_kernel")
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", "return ['healthy_kernel']")
    install()
    resolution = kernelry.resolve(fresh_request)
    assert (resolution.kernel, resolution.rule) == ("healthy_kernel", "votes of plugins")


def test_without_votes_the_name_decides(shelf, install, fresh_request):
    shelf.put_kernel("second", "another_kernel")
    install()
    assert kernelry.resolve(fresh_request).kernel == "another_kernel"


def test_abstaining_leaves_the_order_alone(shelf, install, fresh_request):
    shelf.put_kernel("second", "another_kernel")
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", "return None")
    install()
    assert kernelry.resolve(fresh_request).kernel == "another_kernel"


def test_vote_that_raises_is_lost_and_the_others_count(shelf, install, fresh_request):
    shelf.put_kernel("second", "another_kernel")
    shelf.put_hook("broken", "kernelry_rank(request, candidates)", "1 / 0")
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", "return ['healthy_kernel']")
    install()
    with pytest.warns(UserWarning, match="plugin broken: kernelry_rank raised ZeroDivisionError"):
        assert kernelry.resolve(fresh_request).kernel == "healthy_kernel"


@pytest.mark.parametrize("vote", ["7", "'healthy_kernel'", "[7]"])
def test_vote_of_the_wrong_type_is_lost(shelf, install, fresh_request, vote):
    shelf.put_kernel("second", "another_kernel")
    shelf.put_hook("broken", "kernelry_rank(request, candidates)", f"return {vote}")
    install()
    with pytest.warns(UserWarning, match="plugin broken: kernelry_rank raised .* must return a list of kernel names"):
        assert kernelry.resolve(fresh_request).kernel == "another_kernel"


def test_ranker_may_leave_parameters_out(shelf, install, fresh_request):
    shelf.put_kernel("second", "another_kernel")
    shelf.put_hook("voter", "kernelry_rank(candidates)", "return candidates[-1:]")
    install()
    assert kernelry.resolve(fresh_request).kernel == "healthy_kernel"


OBSERVER = """
    from kernelry.plugin import hookimpl
    contract = (1, 1)
    seen = []

    @hookimpl
    def kernelry_resolved(resolution):
        seen.append(resolution)
"""


def test_observer_sees_the_resolution(shelf, install, fresh_request):
    shelf.put("observer", OBSERVER)
    install()
    resolution = kernelry.resolve(fresh_request)
    assert sys.modules["observer"].seen == [resolution]


def test_observer_that_raises_is_reported_and_the_others_are_called(shelf, install, fresh_request):
    shelf.put_hook("broken", "kernelry_resolved(resolution)", "1 / 0")
    shelf.put("observer", OBSERVER)
    install()
    with pytest.warns(UserWarning, match="plugin broken: kernelry_resolved raised ZeroDivisionError"):
        resolution = kernelry.resolve(fresh_request)
    assert sys.modules["observer"].seen == [resolution]
