"""Votes and observers of plugins: heard, and isolated when they raise."""

import dataclasses
import sys

import pytest

import kernelry
from kernelry.policy.measurements import Entry, Measurements
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import Condition, Rule


def test_vote_orders_the_candidates(shelf, install, fresh_request):
    shelf.put_kernel("second", "another_kernel")
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", "return ['healthy_kernel']")
    install()
    resolution = kernelry.resolve(fresh_request)
    assert (resolution.kernel, resolution.rule) == ("healthy_kernel", "votes of plugins: voter")


RANKING = "from kernelry.plugin import Ranking; return Ranking({}, {})"


def test_a_ranking_says_how_it_knows(shelf, install, fresh_request):
    shelf.put_kernel("second", "another_kernel")
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", RANKING.format("('healthy_kernel',)", "'by hand'"))
    install()
    resolution = kernelry.resolve(fresh_request)
    assert (resolution.kernel, resolution.rule) == ("healthy_kernel", "votes of plugins: voter (by hand)")
    assert resolution.to_json()["rule"] == resolution.rule


def test_a_ranking_counts_as_a_list_of_the_same_names(shelf, install, fresh_request):
    shelf.put_kernel("second", "another_kernel")
    shelf.put_hook("one", "kernelry_rank(request, candidates)", RANKING.format("('healthy_kernel',)", "'once'"))
    for name in ("three", "two"):
        shelf.put_hook(name, "kernelry_rank(request, candidates)", "return ['another_kernel', 'healthy_kernel']")
    install()
    resolution = kernelry.resolve(fresh_request)  # of two candidates: 2 + 2 points against 2 + 1 + 1
    assert resolution.kernel == "another_kernel"
    assert resolution.rule == "votes of plugins: one (once), three, two"


def test_votes_decide_nothing_where_the_kernels_that_have_some_do_not_serve(shelf, install, fresh_request):
    shelf.put_kernel("second", "dot_product")
    elsewhere = """
        @hookimpl
        def kernelry_rank(request, candidates):
            return ["tpu_kernel"]
    """
    shelf.put_kernel("voter", "tpu_kernel", extra=elsewhere)
    registry = install()
    assert registry.faults == ()
    kernel = registry.kernels["tpu_kernel"].spec
    narrow = dataclasses.replace(kernel.capabilities, platforms=frozenset({"tpu"}))
    plain = registry.kernels["dot_product"].spec
    kernels = (dataclasses.replace(kernel, capabilities=narrow), plain)
    resolution = kernelry.resolve(fresh_request, kernels=kernels)
    assert resolution.kernel == "dot_product"
    assert resolution.rule.startswith("shipped policy: ")
    assert resolution.candidates[0].name == "tpu_kernel"


def test_a_plugin_that_names_nothing_has_not_voted(shelf, install, fresh_request):
    shelf.put_hook("silent", "kernelry_rank(request, candidates)", "return []")
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", "return ['healthy_kernel']")
    install()
    assert kernelry.resolve(fresh_request).rule == "votes of plugins: voter"


def test_a_vote_with_a_source_beats_the_shipped_rules_and_no_rule_or_measurement(shelf, install, fresh_request):
    shelf.put_kernel("second", "dot_product")  # the shipped policy's choice
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", RANKING.format("('healthy_kernel',)", "'published'"))
    install()
    assert kernelry.resolve(fresh_request).kernel == "healthy_kernel"
    ruled = Policy.shipped(rules=[Rule(Condition(), ("dot_product", "auto"))], switches=Switches())
    assert kernelry.resolve(fresh_request, policy=ruled).kernel == "dot_product"
    timed = Measurements((Entry.of(fresh_request, "dot_product", 1e-3),))
    found = kernelry.resolve(fresh_request, measurements=timed)
    assert (found.kernel, found.rule) == ("dot_product", "measured on cpu: dot_product 1 ms")


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


WRONG = ["7", "'healthy_kernel'", "[7]", "Ranking('healthy_kernel', 'x')", "Ranking((7,), 'x')", "Ranking(('a',), 7)"]


@pytest.mark.parametrize("vote", WRONG)
def test_vote_of_the_wrong_type_is_lost(shelf, install, fresh_request, vote):
    shelf.put_kernel("second", "another_kernel")
    body = f"from kernelry.plugin import Ranking; return {vote}"
    shelf.put_hook("broken", "kernelry_rank(request, candidates)", body)
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
