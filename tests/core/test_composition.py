"""Chains of adapters: the cheapest one that cures every refusal, found the same way every time."""

import dataclasses
import itertools

import pytest

import kernelry
from kernelry.execution.adapters.order import ADAPTERS
from kernelry.plugin import Capabilities, Dims, Feature, Gradient, Policy, Refusal, RefusalCode, Request
from kernelry.resolution.adapting import compose

DENSE = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
PLAIN = dataclasses.replace(
    DENSE.capabilities,
    grouped_heads=False,
    split_head_dim=False,
    head_dims=Dims(minimum=16, maximum=64, multiple_of=16),
    features=frozenset({Feature.SCALE}),
    empty_rows=False,
    clean_hidden_slots=False,
    gradient=Gradient.BACKWARD,
    lse_cotangent=False,
)


def found(request, capabilities=PLAIN, own=lambda _: (), forbidden=frozenset()):
    def refuse(request, settled):
        declared = capabilities.refusals(request)
        return tuple(r for r in (*declared, *own(request)) if r.code not in settled)

    return compose(request, capabilities, refuse, forbidden)


def names(steps):
    return [step.adapter.name for step in steps]


def test_a_request_that_is_served_needs_no_adapters():
    assert found(Request(q_len=32, head_dim=32)) == ((), ())


def test_every_step_continues_where_the_one_before_ended():
    request = Request(q_len=32, q_heads=4, kv_heads=2, head_dim=20, sinks=True)
    steps, refusals = found(request)
    assert not refusals
    assert steps[0].before == request
    assert all(one.after == two.before for one, two in itertools.pairwise(steps))
    assert not PLAIN.refusals(steps[-1].after)


def test_the_spare_column_pads_the_head_dim_at_once_because_that_costs_less():
    steps, _ = found(Request(q_len=32, head_dim=20, partial=True))
    assert names(steps) == ["lse_gradient_column"]
    assert (steps[0].after.head_dim, steps[0].after.value_dim) == (32, 32)


def test_an_adapter_stands_in_a_chain_at_most_twice():
    steps, refusals = found(
        Request(q_len=32, q_heads=4, kv_heads=2),
        own=lambda _: (Refusal(RefusalCode.HEAD_GROUPS, "never content"),),
    )
    assert steps == ()
    assert [refusal.detail for refusal in refusals] == ["never content"]


def test_lengths_are_made_equal_first_and_then_what_the_kernel_itself_wants():
    def own(request):
        if request.q_len % 16 == 0:
            return ()
        size = -(-request.q_len // 16) * 16
        return (Refusal(RefusalCode.SEQUENCE_LENGTH, "uneven", pad_to=(("q_len", size), ("kv_len", size))),)

    equal = dataclasses.replace(PLAIN, unequal_lengths=False, clean_hidden_slots=True, empty_rows=True)
    steps, refusals = found(Request(q_len=20, kv_len=40, head_dim=32), equal, own)
    assert not refusals
    assert names(steps) == ["pad_sequence", "pad_sequence"]
    assert (steps[-1].after.q_len, steps[-1].after.kv_len) == (48, 48)


def test_what_no_adapter_cures_is_reported_without_what_one_would():
    request = Request(q_len=32, q_heads=4, kv_heads=2, head_dim=128)
    _, refusals = found(request)
    assert [refusal.detail for refusal in refusals] == ["head_dim=128 > 64"]


@pytest.mark.parametrize("adapter", ["repeat_kv_heads", "sinks_from_lse", "pad_head_dim"])
def test_a_forbidden_adapter_is_named_in_the_refusal(adapter):
    request = Request(q_len=32, q_heads=4, kv_heads=2, head_dim=20, sinks=True)
    steps, refusals = found(request, forbidden=frozenset({adapter}))
    assert steps == ()
    assert any(f"{adapter} would help, which the policy forbids" in str(refusal) for refusal in refusals)


@pytest.mark.parametrize("adapter", [adapter.name for adapter in ADAPTERS])
def test_a_policy_can_forbid_every_adapter(adapter):
    assert adapter in Policy.shipped(forbidden_adapters=[adapter]).forbidden_adapters
    request = Request(q_len=32, q_heads=4, kv_heads=2, head_dim=20, sinks=True, mask=kernelry.masks.Causal())
    steps, _ = found(request, forbidden=frozenset({adapter}))
    assert adapter not in names(steps)


def test_a_kernel_that_declares_nothing_is_not_served_by_adapters():
    steps, refusals = found(Request(q_len=32), Capabilities())
    assert steps == ()
    assert refusals


def test_the_order_of_adapters_does_not_decide(monkeypatch):
    request = Request(q_len=32, q_heads=4, kv_heads=2, head_dim=20, sinks=True)
    expected = [dataclasses.astuple(step.cost) for step in found(request)[0]]
    monkeypatch.setattr("kernelry.execution.adapters.order.ADAPTERS", ADAPTERS[::-1])
    assert [dataclasses.astuple(step.cost) for step in found(request)[0]] == expected
