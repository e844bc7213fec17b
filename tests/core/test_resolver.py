"""Choosing: authority, rules, votes, measurements, refusals, and what each answer says."""

import dataclasses
import functools
import json
import logging
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import Request, masks
from kernelry.errors import ConfigError, KernelRefusedError, NoKernelError, PluginError
from kernelry.kernel.spec import Environment, Knowledge
from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Gradient,
    Kernel,
    KernelSpec,
    Mode,
    Operand,
    Partial,
    Refusal,
    RefusalCode,
    Statistic,
    Tiling,
)
from kernelry.policy.measurements import Entry, Measurements
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import Condition, Range, Rule
from kernelry.resolution import resolver

PLAIN = Capabilities(
    platforms=frozenset({"cpu"}),
    modes=frozenset(Mode),
    dtypes=frozenset({"float32"}),
    head_dims=Dims(maximum=128),
    atoms=frozenset({AtomKind.CAUSAL}),
    normalizations=frozenset({"softmax"}),
    gradient=Gradient.NATIVE,
    gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
)


class Zero(Kernel):
    """Returns zeros: its results tell that it ran."""

    def forward(self, inputs, request, tiling, *, statistics):
        with jax.named_scope("tests.zero"):
            shape = (*inputs.query.shape[:3], request.value_dim)
            lse = jnp.zeros((request.batch, request.q_heads, request.q_len)) if statistics else None
            return Partial(jnp.zeros(shape) * inputs.query.sum(), lse=lse, dtype=request.dtype)


def spec(name, capabilities=PLAIN, **changes):
    return KernelSpec(name=name, capabilities=capabilities, load=Zero, signature=lambda _: ("tests.zero",), **changes)


A, B, C = spec("a"), spec("b"), spec("c")
REQUEST = Request(q_len=8)
NO_SWITCHES = Switches()


def policy(*rules, **kwargs):
    return Policy.shipped(rules=rules, switches=NO_SWITCHES, **kwargs)


def test_an_equal_question_gets_the_same_answer():
    assert kernelry.resolve(Request(q_len=8)) is kernelry.resolve(Request(q_len=8))


def test_without_rules_the_name_decides_among_strangers():
    resolution = kernelry.resolve(REQUEST, kernels=(C, B, A), policy=policy())
    assert [candidate.name for candidate in resolution.candidates] == ["a", "b", "c"]
    assert resolution.kernel == "a"


def test_the_order_of_kernels_never_matters():
    answers = [kernelry.resolve(REQUEST, kernels=ks, policy=policy()).to_json() for ks in ((A, B, C), (C, A, B))]
    assert answers[0] == answers[1]


def test_the_first_matching_rule_decides_and_is_named():
    rules = (
        Rule(Condition(mode=(Mode.DECODE,)), ("a",), source="decode rule"),
        Rule(Condition(q_len=Range(1, 10)), ("c", "auto"), source="short rule"),
        Rule(Condition(), ("b",), source="last rule"),
    )
    resolution = kernelry.resolve(REQUEST, kernels=(A, B, C), policy=policy(*rules))
    assert resolution.kernel == "c"
    assert resolution.decided_by is rules[1]
    assert resolution.rule.startswith("short rule: when q_len=1..10 use c, auto")


def test_an_exhaustive_rule_lets_nothing_else_in():
    narrow = spec("narrow", PLAIN_HALF)
    rules = (Rule(Condition(), ("narrow",), source="only narrow"),)
    with pytest.raises(NoKernelError) as caught:
        kernelry.resolve(REQUEST, kernels=(narrow, A), policy=policy(*rules))
    assert not isinstance(caught.value, KernelRefusedError)
    for words in (
        "narrow: dtype=float32 is not bfloat16",
        "decided by: only narrow",
        "not considered, by this rule: a; name one",
    ):
        assert words in str(caught.value)


PLAIN_HALF = Capabilities(
    **{
        **{name: getattr(PLAIN, name) for name in PLAIN.__dataclass_fields__},
        "dtypes": frozenset({"bfloat16"}),
    }
)


def test_a_rule_ending_in_auto_moves_on_and_records_why():
    narrow = spec("narrow", PLAIN_HALF)
    rules = (Rule(Condition(), ("narrow", "auto"), source="r"),)
    resolution = kernelry.resolve(REQUEST, kernels=(narrow, A), policy=policy(*rules))
    assert resolution.kernel == "a"
    assert [(c.name, c.refusals[0].code) for c in resolution.refused] == [("narrow", RefusalCode.DTYPE)]


def test_a_rule_may_name_a_kernel_that_is_not_installed():
    rules = (Rule(Condition(), ("absent", "auto"), source="r"),)
    resolution = kernelry.resolve(REQUEST, kernels=(A,), policy=policy(*rules))
    assert resolution.kernel == "a"
    assert resolution.refused[0].refusals[0].code is RefusalCode.NOT_INSTALLED


def test_authority_runs_from_argument_over_scope_and_environment_to_rules():
    ruled = policy(Rule(Condition(), ("c",), source="r"))
    forced = Policy.shipped(rules=ruled.rules, switches=Switches(kernel="b"))
    kernels = (A, B, C, spec("d"))
    assert kernelry.resolve(REQUEST, kernels=kernels, policy=ruled).kernel == "c"
    assert kernelry.resolve(REQUEST, kernels=kernels, policy=forced).kernel == "b"
    with kernelry.use("d"):
        assert kernelry.resolve(REQUEST, kernels=kernels, policy=forced).kernel == "d"
        assert kernelry.resolve(REQUEST, kernels=kernels, policy=forced, kernel="a").kernel == "a"
        with kernelry.use("auto"):
            assert kernelry.resolve(REQUEST, kernels=kernels, policy=forced).kernel == "b"


def test_an_explicit_kernel_is_absolute():
    narrow = spec("narrow", PLAIN_HALF)
    with pytest.raises(KernelRefusedError) as caught:
        kernelry.resolve(REQUEST, kernels=(narrow, A), kernel="narrow", policy=policy())
    for words in ("Kernel 'narrow'", "dtype=float32 is not bfloat16", 'kernel="auto"'):
        assert words in str(caught.value)
    assert caught.value.resolution.kernel is None


def test_a_misspelt_kernel_names_the_nearest():
    with pytest.raises(KernelRefusedError, match="did you mean 'dot_product'"):
        kernelry.resolve(REQUEST, kernel="dotproduct")


def test_measurements_outrank_the_shipped_policy():
    timed = Measurements((Entry.of(REQUEST, "c", 1e-3), Entry.of(REQUEST, "b", 2e-3)))
    resolution = kernelry.resolve(REQUEST, kernels=(A, B, C), policy=policy(), measurements=timed)
    assert [candidate.name for candidate in resolution.candidates] == ["c", "b", "a"]
    assert resolution.rule == "measured on cpu: c 1 ms, b 2 ms"
    other = kernelry.resolve(Request(q_len=90), kernels=(A, B, C), policy=policy(), measurements=timed)
    assert other.kernel == "a"


def test_a_faulty_refusals_function_is_a_refusal():
    def broken(request, environment):
        raise RuntimeError("boom")

    resolution = kernelry.resolve(REQUEST, kernels=(spec("a", refusals=broken), B), policy=policy())
    assert resolution.kernel == "b"
    assert "boom" in str(resolution.refused[0].refusals[0])


def test_probing_happens_at_home_for_the_winner_only():
    asked = []

    def question_a():
        asked.append("a")

    def question_b():
        asked.append("b")

    def asks(question):
        def refusals(request, environment):
            why = environment.probe(question)
            return (Refusal(RefusalCode.DRIVER, why),) if why else ()

        return refusals

    kernels = (spec("a", refusals=asks(question_a)), spec("b", refusals=asks(question_b)))
    resolution = kernelry.resolve(REQUEST, kernels=kernels, policy=policy())
    assert asked == ["a"]
    assert resolution.candidates[1].notes == ("vendor: not probed",)


def test_kernels_behind_the_winner_are_asked_when_somebody_looks():
    asked = []

    def remembering(name):
        def refusals(request, environment):
            asked.append(name)
            return (Refusal(RefusalCode.DRIVER, f"{name} has no driver"),) if name == "c" else ()

        return spec(name, refusals=refusals)

    kernels = tuple(map(remembering, "abc"))
    resolution = kernelry.resolve(REQUEST, kernels=kernels, policy=policy())
    assert resolution.winner.name == "a"
    assert asked == ["a"]
    assert "c has no driver" in str(resolution)
    assert asked == ["a", "b", "c"]
    assert [candidate.name for candidate in resolution.refused] == ["c"]
    assert asked == ["a", "b", "c"]  # once


def test_candidates_are_compared_copied_and_counted_as_a_tuple_of_them():
    first, second = (kernelry.explain(Request(q_len=9), kernels=(A, B, C), policy=policy()) for _ in range(2))
    resolver.clear_cache()
    again = kernelry.explain(Request(q_len=9), kernels=(A, B, C), policy=policy())
    assert first is second
    assert again is not first
    assert again.candidates == first.candidates == tuple(first.candidates)
    assert tuple(first.candidates) == again.candidates
    assert hash(again.candidates) == hash(tuple(first.candidates))
    assert (len(again.candidates), again.candidates[-1].name) == (3, "c")
    assert pickle.loads(pickle.dumps(again.candidates)) == first.candidates
    assert repr(again.candidates) == repr(tuple(first.candidates))
    assert again.candidates != (*first.candidates, first.candidates[0])


def test_foreign_targets_are_assumed_not_probed():
    def question():
        raise AssertionError("must not be asked")

    def refusals(request, environment):
        return (Refusal(RefusalCode.DRIVER, "no driver"),) if environment.probe(question) else ()

    can = Capabilities(
        **{**{n: getattr(PLAIN, n) for n in PLAIN.__dataclass_fields__}, "platforms": frozenset({"gpu"})}
    )
    resolution = kernelry.resolve(
        Request(q_len=8, target="gpu:h100"), kernels=(spec("g", can, refusals=refusals),), policy=policy()
    )
    assert resolution.candidates[0].notes == ("vendor: assumed",)


def test_a_call_for_another_platform_takes_no_kernel_whose_library_is_missing_here():
    """Its program is made on this machine, whatever the other one has; who names the kernel gets it, or an error."""

    def refusals(request, environment):
        return tuple(environment.vendor("no-such-distribution").refusals("pip install no-such-distribution"))

    can = dataclasses.replace(PLAIN, platforms=frozenset({"gpu"}))
    kernels = (spec("a_needs", can, refusals=refusals), spec("b_plain", can))
    these = policy(Rule(Condition(), ("a_needs", "b_plain"), source="test"))
    assert kernelry.resolve(Request(q_len=8, target="gpu:h100"), kernels=kernels, policy=these).kernel == "a_needs"
    array = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.float32)
    with kernelry.record() as resolutions, kernelry.use(kernels=kernels, target="gpu:h100", policy=these):
        jax.eval_shape(kernelry.attention, array, array, array)
        jax.eval_shape(functools.partial(kernelry.attention, kernel="a_needs"), array, array, array)
    chosen, named = resolutions
    assert (chosen.kernel, named.kernel) == ("b_plain", "a_needs")
    passed_over = next(candidate for candidate in chosen.candidates if candidate.name == "a_needs")
    [refusal] = passed_over.refusals
    assert str(refusal) == "no-such-distribution is not installed; pip install no-such-distribution"


def test_stated_versions_win_over_looking():
    environment = Environment(Knowledge.PROBED, (("jax", None), ("nothing", "1.0")))
    assert environment.vendor("jax").missing
    assert environment.vendor("nothing").version == "1.0"
    assert environment.vendor("numpy").version == np.__version__
    assert environment.vendor("no-such-distribution").missing


def test_tiling_overrides_reach_the_plan():
    tiled = spec("a", tilings=lambda _: (Tiling.of(block_q=64), Tiling.of(block_q=128)))
    rules = (Rule(Condition(), ("a",), (("block_q", 32),), "r"),)
    assert kernelry.resolve(REQUEST, kernels=(tiled,), policy=policy()).plan.tiling["block_q"] == 64
    assert kernelry.resolve(REQUEST, kernels=(tiled,), policy=policy(*rules)).plan.tiling["block_q"] == 32
    with kernelry.use(tiling={"block_q": 16}):
        assert kernelry.resolve(REQUEST, kernels=(tiled,), policy=policy(*rules)).plan.tiling["block_q"] == 16


def test_a_tiling_that_a_kernel_does_not_have_is_a_refusal():
    with kernelry.use(tiling={"blockq": 16}), pytest.raises(NoKernelError, match="no tunable 'blockq'"):
        kernelry.resolve(REQUEST, kernels=(A,), policy=policy())


def test_adapters_serve_what_the_kernel_refuses_and_show_their_cost():
    grouped = Request(q_len=8, q_heads=4, kv_heads=2)
    resolution = kernelry.resolve(grouped, kernels=(A,), policy=policy())
    assert [step.adapter.name for step in resolution.plan.steps] == ["repeat_kv_heads"]
    assert resolution.plan.inner_request.kv_heads == 4
    assert resolution.plan.cost.extra_bytes == 4 * 8 * (64 + 64) * 4
    assert "through repeat_kv_heads" in resolution.explain()


def test_adapters_combine():
    can = Capabilities(
        **{**{n: getattr(PLAIN, n) for n in PLAIN.__dataclass_fields__}, "statistics": frozenset({Statistic.LSE})}
    )
    request = Request(q_len=8, q_heads=4, kv_heads=2, sinks=True)
    resolution = kernelry.resolve(request, kernels=(spec("a", can),), policy=policy())
    assert {step.adapter.name for step in resolution.plan.steps} == {"repeat_kv_heads", "sinks_from_lse"}


def test_a_policy_can_forbid_adapters():
    grouped = Request(q_len=8, q_heads=4, kv_heads=2)
    forbidding = policy(forbidden_adapters=["repeat_kv_heads"])
    with pytest.raises(NoKernelError, match="q_heads=4 share kv_heads=2"):
        kernelry.resolve(grouped, kernels=(A,), policy=forbidding)


def test_kernels_given_without_a_plain_one_say_that_it_is_left_out():
    with pytest.raises(NoKernelError, match="kernelry-dot-product is installed, but kernels= leaves it out"):
        kernelry.resolve(REQUEST, kernels=(), policy=policy())


def test_explain_does_not_raise():
    resolution = kernelry.explain(REQUEST, kernels=(), policy=policy())
    assert resolution.plan is None
    assert "decided by" in str(resolution)


def test_resolutions_are_json():
    data = json.loads(json.dumps(kernelry.resolve(Request(q_len=1024, mask=masks.SlidingWindow(5))).to_json()))
    assert data["plan"]["kernel"] in {candidate["name"] for candidate in data["candidates"]}
    assert Request.from_json(data["request"]) == Request(q_len=1024, mask=masks.SlidingWindow(5))


def test_each_new_resolution_is_logged_once(caplog):
    request = Request(q_len=77, batch=3)
    with caplog.at_level(logging.INFO, logger="kernelry"):
        kernelry.resolve(request)
        kernelry.resolve(request)
    assert len([line for line in caplog.messages if "T=77" in line]) == 1


def test_use_changes_an_already_jitted_function():
    q = jnp.ones((1, 8, 1, 64))
    function = jax.jit(lambda q: kernelry.attention(q, q, q))
    assert np.asarray(function(q)).any()
    with kernelry.use("a", kernels=[A]):
        assert not np.asarray(function(q)).any()
    assert np.asarray(function(q)).any()


def test_record_sees_functions_that_are_already_jitted():
    q = jnp.ones((1, 8, 1, 64))
    function = jax.jit(lambda q: kernelry.attention(q, q, q, mask=masks.Causal()))
    function(q)
    with kernelry.record() as outer, kernelry.record() as inner:
        function(q)
    assert [resolution.kernel for resolution in inner] == ["dot_product"]
    assert outer == inner


def test_record_keeps_one_entry_per_call():
    q = jnp.ones((1, 8, 1, 64))
    with kernelry.record() as resolutions:
        kernelry.attention(q, q, q)
        kernelry.attention(q, q, q, mode="prefill")
    assert [resolution.request.mode for resolution in resolutions] == [Mode.TRAIN, Mode.PREFILL]


def test_use_refuses_what_is_no_kernel_spec():
    with pytest.raises(ValueError, match="KernelSpecs"), kernelry.use(kernels=["a"]):
        pass


def test_use_refuses_a_spec_that_cannot_be_hashed():
    unhashable = spec("a", Capabilities(platforms={"cpu"}))
    with pytest.raises(ValueError, match="kernel 'a' cannot be hashed"), kernelry.use(kernels=[unhashable]):
        pass


def test_use_target_answers_for_other_hardware():
    q = jnp.ones((1, 8, 1, 64))
    with kernelry.use(target="tpu:v5e"), kernelry.record() as resolutions:
        jax.eval_shape(lambda q: kernelry.attention(q, q, q), q)
    assert str(resolutions[0].request.target) == "tpu:v5e"


def test_the_active_abstract_mesh_is_the_target():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    q = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh), kernelry.record() as resolutions:
        jax.jit(lambda q: kernelry.attention(q, q, q)).trace(q)
    assert str(resolutions[0].request.target) == "gpu:h100"


def test_verify_finds_the_kernel_in_the_program_and_catches_an_impostor():
    q = jnp.ones((1, 8, 1, 64))
    with kernelry.record() as resolutions:
        lowered = jax.jit(lambda q: kernelry.attention(q, q, q, kernel="dot_product")).lower(q)
    resolutions[0].verify(lowered)
    resolutions[0].verify(lowered.compile())
    with pytest.raises(PluginError, match="signature of kernel 'dot_product'"):
        resolutions[0].verify(jax.jit(lambda q: q + 1).lower(q))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (">=128", 128, 127),
        (">128", 129, 128),
        ("<=8", 8, 9),
        ("<8", 7, 8),
        ("128..256", 200, 257),
        (64, 64, 65),
        ("64", 64, 63),
    ],
)
def test_ranges_are_read(text, inside, outside):
    found = Range.parse(text)
    assert inside in found
    assert outside not in found


@pytest.mark.parametrize("text", ["abc", ">=", "1-2", True, ""])
def test_ranges_that_cannot_be_read_are_errors(text):
    with pytest.raises(ConfigError, match="as a range"):
        Range.parse(text)


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        (Condition(platform=("gpu", "cpu")), True),
        (Condition(platform=("tpu",)), False),
        (Condition(mode=(Mode.TRAIN,)), True),
        (Condition(kind=("v5*",)), False),
        (Condition(dtype=("float32",)), True),
        (Condition(head_dim=Range(65)), False),
        (Condition(batch=Range(1, 1)), True),
        (Condition(mask=("causal",)), True),
        (Condition(mask=("causal", "segments")), False),
        (Condition(mask=("full",)), False),
    ],
)
def test_conditions_look_at_their_field(condition, matches):
    assert condition.matches(Request(q_len=8, mask=masks.Causal())) is matches


def test_kind_globs_match_device_kinds():
    assert Condition(kind=("v5*",)).matches(Request(q_len=8, target="tpu:v5p"))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Rule(Condition(), ()), "at least one kernel"),
        (lambda: Rule(Condition(), ("auto", "a")), "only come last"),
        (lambda: Condition(mask=("casual",)), "did you mean 'causal'"),
        (lambda: Condition(platform=("gpux",)), "did you mean 'gpu'"),
        (lambda: Condition(dtype=("bf16",)), "bfloat16"),
        (lambda: policy(thresholds={"flash_min": 3}), "did you mean 'flash_min_q_len'"),
    ],
)
def test_policies_that_mean_nothing_are_errors(make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make()


def test_every_shipped_threshold_has_a_unit_and_a_source():
    for threshold in policy().thresholds:
        assert threshold.unit
        assert threshold.source


def test_a_threshold_changes_the_choice():
    request = Request(q_len=1024, mask=masks.SlidingWindow(64))
    assert kernelry.resolve(request, policy=policy()).kernel == "blockwise"
    higher = policy(thresholds={"cpu_blockwise_min_train_kv_len": 2048})
    assert kernelry.resolve(request, policy=higher).kernel == "dot_product"


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(64), masks.Segments(jnp.zeros(4096, int))])
def test_thresholds_of_cpus_are_for_one_mode_each(mode, mask):
    request = Request(q_len=4096, mode=mode, mask=mask)
    assert kernelry.resolve(request, policy=policy()).kernel == "blockwise"
    names = [threshold.name for threshold in policy().thresholds if threshold.name.startswith("cpu_blockwise_min_")]
    own, others = ([name for name in names if (f"_{mode.value}_" in name) is is_own] for is_own in (True, False))
    for raised, kernel in ((own, "dot_product"), (others, "blockwise")):
        raising = policy(thresholds=dict.fromkeys(raised, 8192))
        assert kernelry.resolve(request, policy=raising).kernel == kernel


def test_a_rules_tiling_is_for_the_kernels_it_names():
    tiled = spec("a", PLAIN_HALF, tilings=lambda _: (Tiling.of(block_q=64),))
    rules = (Rule(Condition(), ("a", "auto"), (("block_q", 32),), "r"),)
    assert kernelry.resolve(REQUEST, kernels=(tiled, B), policy=policy(*rules)).kernel == "b"


@pytest.mark.parametrize("block", [0, -8, 64.5, True])
def test_block_sizes_must_be_positive_integers(block):
    with kernelry.use(tiling={"block_q": block}), pytest.raises(NoKernelError, match="must be a positive integer"):
        kernelry.resolve(Request(q_len=512), kernel="blockwise")


@pytest.mark.parametrize("answer", ["no", ("no",), 3])
def test_refusals_of_the_wrong_type_are_a_fault_of_that_kernel(answer):
    faulty = spec("a", refusals=lambda *_: answer)
    resolution = kernelry.resolve(REQUEST, kernels=(faulty, B), policy=policy())
    assert resolution.kernel == "b"
    assert resolution.refused[0].refusals[0].code is RefusalCode.FAULT


def test_capabilities_of_the_wrong_type_are_a_fault_of_that_kernel():
    faulty = spec("a", Capabilities(platforms=frozenset({"cpu"}), head_dims=(64, 128)))
    assert kernelry.resolve(REQUEST, kernels=(faulty, B), policy=policy()).kernel == "b"


def test_values_are_found_again_in_another_process():
    values = (Request(q_len=8, mask=masks.SlidingWindow(3)), masks.Causal().form, policy(Rule(Condition(), ("a",))))
    code = (
        "import pickle, sys; values = pickle.load(sys.stdin.buffer);"
        "rebuilt = [make(*facts) for make, facts in (value.__reduce__() for value in values)];"
        "assert [hash(v) for v in values] == [hash(r) for r in rebuilt]"
    )
    environ = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(values), env=environ, check=True)


CHUNK = Request(target="gpu:h100", mode="prefill", q_len=128, kv_len=4096, head_dim=64, dtype="bfloat16")


PADDING = tuple(kernel.spec for kernel in kernelry.kernels() if kernel.name in ("pallas_mha", "dot_product"))
"""pallas_mha pads the queries to as many as the keys; the shipped policy has it before dot_product."""


def test_a_kernel_whose_adapters_multiply_the_work_goes_behind_others():
    resolution = kernelry.explain(CHUNK, kernels=PADDING, policy=Policy.shipped())
    assert resolution.kernel == "dot_product"
    [padded] = [candidate for candidate in resolution.candidates if candidate.name == "pallas_mha"]
    assert not padded.refusals
    assert "its adapters add 31.0 times the work: ranked below kernels that need less" in padded.notes


def test_a_kernel_whose_adapters_multiply_the_work_runs_where_it_is_asked_for():
    assert kernelry.explain(CHUNK, kernel="pallas_mha").kernel == "pallas_mha"
    ruled = Policy.shipped(rules=[Rule(Condition(), ("pallas_mha", "auto"))])
    assert kernelry.explain(CHUNK, policy=ruled).kernel == "pallas_mha"


def test_how_much_work_adapters_may_add_is_a_threshold():
    generous = Policy.shipped(thresholds={"adapters_max_extra_work": 5000})
    assert kernelry.explain(CHUNK, kernels=PADDING, policy=generous).kernel == "pallas_mha"


def test_a_kernel_whose_adapters_multiply_the_work_is_better_than_none():
    alone = tuple(spec for spec in PADDING if spec.name == "pallas_mha")
    assert kernelry.explain(CHUNK, kernels=alone, policy=Policy.shipped()).kernel == "pallas_mha"


def test_a_kernel_that_was_timed_through_its_adapters_needs_no_other_proof():
    timed = Measurements((Entry.of(CHUNK, "pallas_mha", 1e-3), Entry.of(CHUNK, "dot_product", 2e-3)))
    assert kernelry.explain(CHUNK, measurements=timed).kernel == "pallas_mha"
