"""Reservations: `auto` passes a kernel over that could serve; whoever names it, or KERNELRY_EXPERIMENTAL=1, gets it."""

import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelry
from kernelry import Request
from kernelry.config import Lock
from kernelry.errors import ArgumentError, ConfigError, NoKernelError
from kernelry.execution.adapters.order import ADAPTERS
from kernelry.masks import Causal
from kernelry.plugin import Environment, Feature, Knowledge, Mode, Refusal, RefusalCode
from kernelry.policy.measurements import Entry, Kind, Measurements
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import Condition, Rule
from kernelry.testing import conformance
from kernelry.testing.conformance import Outcome
from kernelry_dot_product.plugin import DOT_PRODUCT

EXPERIMENTAL = Refusal(RefusalCode.EXPERIMENTAL, "first release")


def always(request):
    return (EXPERIMENTAL,)


def with_statistics(request):
    if request.statistics or request.partial:
        return (Refusal(RefusalCode.STATISTICS, "its lse is rounded to bfloat16"),)
    return ()


def raising(request):
    raise RuntimeError("no answer")


def spec(name, reservations=always, **changes):
    return dataclasses.replace(DOT_PRODUCT, name=name, reservations=reservations, **changes)


NEW = spec("a_new")  # by name it would come first
OLD = dataclasses.replace(DOT_PRODUCT, name="old")
KERNELS = (NEW, OLD)
REQUEST = Request(q_len=8)


def policy(*rules, **switches):
    return Policy.shipped(rules=rules, switches=Switches(**switches))


PLAIN = policy()


def resolve(request=REQUEST, kernels=KERNELS, policy=PLAIN, **given):
    return kernelry.resolve(request, kernels=kernels, policy=policy, **given)


def test_auto_passes_over_a_kernel_with_reservations_and_says_how_to_get_it():
    found = resolve()
    assert found.kernel == "old"
    [passed] = found.refused
    assert (passed.name, passed.reservations) == ("a_new", (EXPERIMENTAL,))
    assert passed.refusals[0].code is RefusalCode.EXPERIMENTAL
    said = (
        'a_new: passed over: first release; it serves with kernel="a_new", a rule that lists it, or '
        "KERNELRY_EXPERIMENTAL=1"
    )
    assert said in str(found)


def in_scope():
    with kernelry.use("a_new"):
        return resolve()


NAMED = {
    "argument": lambda: resolve(kernel="a_new"),
    "use": in_scope,
    "KERNELRY_KERNEL": lambda: resolve(policy=policy(kernel="a_new")),
    "rule": lambda: resolve(policy=policy(Rule(Condition(), ("a_new",)))),
    "rule ending in auto": lambda: resolve(policy=policy(Rule(Condition(), ("a_new", "auto")))),
    "KERNELRY_EXPERIMENTAL": lambda: resolve(policy=policy(experimental=True)),
}


@pytest.mark.parametrize("name", NAMED)
def test_it_serves_when_it_is_named_and_explanations_still_tell_why_not(name):
    found = NAMED[name]()
    assert found.kernel == "a_new"
    assert found.winner.refusals == ()
    assert found.winner.reservations == (EXPERIMENTAL,)
    assert "→ a_new [given to resolve]: chosen\n      reservation: first release" in str(found)
    [told] = [each for each in found.to_json()["candidates"] if each["name"] == "a_new"]
    assert [each["code"] for each in told["reservations"]] == ["experimental"]
    assert told["refusals"] == []


@pytest.mark.parametrize("rule", [("old", "auto"), ("auto",)])
def test_a_rule_that_does_not_list_it_lifts_nothing(rule):
    assert resolve(policy=policy(Rule(Condition(), rule))).kernel == "old"
    with pytest.raises(NoKernelError, match="passed over: first release"):
        resolve(kernels=(NEW,), policy=policy(Rule(Condition(), rule)))


def test_a_rule_for_other_requests_lifts_nothing():
    assert resolve(policy=policy(Rule(Condition(mode=(Mode.DECODE,)), ("a_new",)))).kernel == "old"


def test_a_kernel_that_a_rule_lists_but_ranks_lower_shows_its_reservation():
    found = resolve(policy=policy(Rule(Condition(), ("old", "a_new"))))
    assert found.kernel == "old"
    assert "a_new: could serve, ranked lower\n      reservation: first release" in str(found)


@pytest.mark.parametrize("kind", ["measured", "predicted"])
def test_a_time_does_not_choose_it(kind):
    entry = Entry.of(REQUEST, "a_new", 1e-9, kind=Kind(kind))
    found = resolve(measurements=Measurements((entry,)))
    assert found.kernel == "old"
    assert resolve(measurements=Measurements((entry,)), policy=policy(experimental=True)).kernel == "a_new"


def test_a_vote_does_not_choose_it(shelf, install, fresh_request):
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", "return ['a_new']")
    install()
    assert resolve(fresh_request).kernel == "old"
    assert resolve(fresh_request, policy=policy(experimental=True)).kernel == "a_new"


def test_reservations_are_about_the_request_inside_the_adapters():
    features = DOT_PRODUCT.capabilities.features - {Feature.SINKS}
    sinkless = dataclasses.replace(DOT_PRODUCT.capabilities, features=features)
    kernel = spec("a_new", lambda request: always(request) * request.sinks, capabilities=sinkless)
    found = resolve(Request(q_len=9, sinks=True), kernels=(kernel, OLD))
    assert found.kernel == "a_new"  # through sinks_from_lse it is asked without them
    kernel = spec("a_new", lambda request: always(request) * (not request.sinks), capabilities=sinkless)
    assert resolve(Request(q_len=9, sinks=True), kernels=(kernel, OLD)).kernel == "old"


def test_parts_of_a_merge_are_reserved_where_statistics_are():
    kernel = spec("a_new", with_statistics)
    assert resolve(kernels=(kernel, OLD)).kernel == "a_new"
    assert resolve(Request(q_len=8, partial=True), kernels=(kernel, OLD)).kernel == "old"
    ring = Request(q_len=8, sharding="sequence=c:2 ring")
    found = resolve(ring, kernels=(kernel, OLD))
    assert found.kernels == ("old",)
    assert "a_new: passed over: its lse is rounded to bfloat16" in str(found)
    assert resolve(ring, kernels=(kernel, OLD), kernel="a_new").kernels == ("a_new",)


def test_no_adapter_cures_a_reservation():
    assert not [adapter.name for adapter in ADAPTERS if RefusalCode.EXPERIMENTAL in adapter.cures]
    sinks = spec("a_new", lambda request: (Refusal(RefusalCode.SINKS, "its sinks are slow"),) if request.sinks else ())
    assert resolve(Request(q_len=10, sinks=True), kernels=(sinks, OLD)).kernel == "old"  # sinks_from_lse cures SINKS


def test_what_it_cannot_serve_is_told_before_any_reservation():
    narrow = spec("a_new", capabilities=dataclasses.replace(DOT_PRODUCT.capabilities, dtypes=frozenset({"float16"})))
    found = resolve(kernels=(narrow, OLD))
    assert [refusal.code for refusal in found.refused[0].refusals] == [RefusalCode.DTYPE]
    assert found.refused[0].reservations == ()


@pytest.mark.parametrize("answer", [raising, lambda _: ("first release",), lambda _: None])
def test_reservations_that_fail_are_one(answer):
    kernel = spec("a_new", answer)
    found = resolve(kernels=(kernel, OLD))
    assert found.kernel == "old"
    assert found.refused[0].refusals[0].code is RefusalCode.FAULT
    assert "its reservations raised" in str(found)
    assert resolve(kernels=(kernel, OLD), kernel="a_new").kernel == "a_new"


def test_reservations_must_be_a_function():
    with pytest.raises(ArgumentError, match="reservations must be a function"), kernelry.use(kernels=[spec("x", 3)]):
        pass


class Probe:
    """A question that counts how often it is asked."""

    __name__ = "probe"

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1


def test_the_vendor_of_a_kernel_that_is_passed_over_is_not_probed():
    probe = Probe()

    def refusals(request, environment):
        environment.probe(probe)
        return ()

    here = Environment(Knowledge.PROBED)
    kernel = spec("a_new", refusals=refusals)
    assert "vendor: not probed" in str(resolve(kernels=(kernel, OLD), environment=here))
    assert probe.asked == 0
    resolve(kernels=(kernel, OLD), environment=here, kernel="a_new")
    assert probe.asked == 1


def test_adapters_that_only_a_probed_vendor_asks_for_are_within_the_question():
    def refusals(request, environment):
        narrow = environment.knowledge is Knowledge.PROBED and environment.probe(lambda: True) and request.q_len % 128
        return (Refusal(RefusalCode.SEQUENCE_LENGTH, "q_len", pad_to=(("q_len", 128),)),) if narrow else ()

    def padded(request):
        return always(request) if request.q_len == 128 else ()

    here = Environment(Knowledge.PROBED)
    kernel = spec("a_new", padded, refusals=refusals)
    assert resolve(kernels=(kernel, OLD), environment=here).kernel == "old"
    assert resolve(kernels=(kernel, OLD), environment=Environment(Knowledge.ASSUMED)).kernel == "a_new"


REQUESTS = st.builds(
    Request,
    q_len=st.integers(1, 300),
    mode=st.sampled_from([Mode.TRAIN, Mode.PREFILL]),
    q_heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([2, 4]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    sinks=st.booleans(),
    mask=st.sampled_from([Causal().form, kernelry.masks.Full().form]),
)


@settings(max_examples=60, deadline=None)
@given(request=REQUESTS, reservations=st.sampled_from([always, with_statistics, raising]))
def test_law_named_it_has_the_plan_of_the_kernel_without_reservations(request, reservations):
    reserved, free = spec("k", reservations), dataclasses.replace(DOT_PRODUCT, name="k")
    lists = policy(Rule(Condition(), ("k", "auto")))
    plans = [
        resolve(request, kernels=(reserved, OLD), kernel="k").plan,
        resolve(request, kernels=(reserved, OLD), policy=lists).plan,
        resolve(request, kernels=(free, OLD), kernel="k").plan,
    ]
    assert len({(plan.steps, plan.request, plan.inner_request, plan.tiling) for plan in plans}) == 1


@settings(max_examples=60, deadline=None)
@given(request=REQUESTS)
def test_law_a_kernel_reserved_for_everything_might_as_well_be_absent_for_auto(request):
    assert resolve(request, kernels=(NEW, OLD)).plan == resolve(request, kernels=(OLD,)).plan


@settings(max_examples=60, deadline=None)
@given(request=REQUESTS, reservations=st.sampled_from([always, with_statistics]))
def test_law_experimental_resolves_as_if_there_were_no_reservations(request, reservations):
    allowed = resolve(request, kernels=(spec("k", reservations), OLD), policy=policy(experimental=True))
    free = resolve(request, kernels=(dataclasses.replace(DOT_PRODUCT, name="k"), OLD))
    assert (allowed.kernel, allowed.plan.steps) == (free.kernel, free.plan.steps)


@pytest.mark.parametrize(
    ("text", "experimental"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False), ("", False)]
)
def test_the_variable_is_read_strictly(text, experimental):
    assert Switches.parse({"KERNELRY_EXPERIMENTAL": text}).experimental is experimental


@pytest.mark.parametrize("text", ["2", "ture", "fa4"])
def test_the_variable_must_be_yes_or_no(text):
    with pytest.raises(ConfigError, match=r"KERNELRY_EXPERIMENTAL='.*' is neither yes nor no; write one of 1, true"):
        Switches.parse({"KERNELRY_EXPERIMENTAL": text})


def test_two_wrong_variables_are_both_told():
    with pytest.raises(ConfigError, match=r"KERNELRY_STRICT='x' is .*; KERNELRY_EXPERIMENTAL='y' is "):
        Switches.parse({"KERNELRY_STRICT": "x", "KERNELRY_EXPERIMENTAL": "y"})


def test_the_variable_of_a_process_decides(shelf):
    code = """
        import dataclasses, kernelry
        from kernelry.plugin import Refusal, RefusalCode
        from kernelry_dot_product.plugin import DOT_PRODUCT
        first = (Refusal(RefusalCode.EXPERIMENTAL, "first release"),)
        new = dataclasses.replace(DOT_PRODUCT, name="a_new", reservations=lambda request: first)
        old = dataclasses.replace(DOT_PRODUCT, name="old")
        print(kernelry.resolve(kernelry.Request(q_len=8), kernels=(new, old)).kernel)
    """
    assert shelf.run(code).stdout.strip() == "old"
    assert shelf.run(code, KERNELRY_EXPERIMENTAL="yes").stdout.strip() == "a_new"


def test_a_call_runs_the_kernel_that_it_names_and_no_other():
    query = jnp.ones((1, 8, 2, 8))
    with kernelry.use(kernels=[NEW]), kernelry.record() as found:
        kernelry.attention(query, query, query)
        kernelry.attention(query, query, query, kernel="a_new")
    assert [each.kernel == "a_new" for each in found] == [False, True]


def test_strict_mode_notices_that_the_variable_was_set_when_the_file_was_written(tmp_path):
    path = tmp_path / "lock.json"
    request = Request(q_len=8)
    Lock.of([resolve(request, policy=policy(experimental=True))]).write(path)
    with kernelry.use(strict=path):
        assert resolve(request, policy=policy(experimental=True)).kernel == "a_new"
        assert resolve(request, kernel="a_new").kernel == "a_new"
        with pytest.raises(ConfigError, match="a_new"):
            resolve(request)


def test_the_conformance_kit_names_its_kernel_and_so_is_not_passed_over():
    free = dataclasses.replace(DOT_PRODUCT, name="a_new")
    cases = [dict.fromkeys(case.name for case in conformance.cases_of(kernel, quick=True)) for kernel in (NEW, free)]
    assert cases[0] == cases[1]
    for case in conformance.cases_of(NEW, quick=True)[::40]:
        assert conformance.run_case(case).outcome in (Outcome.PASSED, Outcome.REFUSED), case.name
