"""What is logged about a new resolution, and what is not."""

import dataclasses
import itertools
import logging

import jax
import jax.numpy as jnp
import pytest

import kernelry
from kernelry import Request
from kernelry.plugin import Capabilities, Dims, Feature, Gradient, Kernel, KernelSpec, Mode, Operand
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import Condition, Rule
from kernelry.resolution.resolver import array_bytes

PLAIN = Capabilities(
    platforms=frozenset({"cpu"}),
    modes=frozenset(Mode),
    dtypes=frozenset({"float32"}),
    head_dims=Dims(maximum=128),
    normalizations=frozenset({"softmax"}),
    gradient=Gradient.NATIVE,
    gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
    features=frozenset({Feature.SCALE}),
)
_lengths = itertools.count(3001)


def _spec(name, **changes):
    return KernelSpec(
        name=name, capabilities=dataclasses.replace(PLAIN, **changes), load=Kernel, signature=lambda _: ("x",)
    )


WIDE, NARROW, ELSEWHERE = (
    _spec("wide"),
    _spec("narrow", dtypes=frozenset({"bfloat16"})),
    _spec("a", platforms=frozenset({"tpu"})),
)


@pytest.fixture
def logged(caplog):
    """Resolves with a policy and returns what was logged, level by level."""

    def resolve(request, kernels, **policy):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="kernelry"):
            kernelry.resolve(request, kernels=kernels, policy=Policy.shipped(switches=Switches(), **policy))
        assert all(record.name == "kernelry" for record in caplog.records)
        return {
            level: [record.getMessage() for record in caplog.records if record.levelno == level]
            for level in (logging.INFO, logging.WARNING)
        }

    return resolve


def _request(**facts):
    return Request(q_len=next(_lengths), **facts)


def _rule(*use):
    return (Rule(Condition(), use, source="r"),)


def test_a_new_resolution_is_one_line_and_a_known_one_none(logged):
    request = _request()
    first, second = logged(request, (WIDE,)), logged(request, (WIDE,))
    assert [len(first[logging.INFO]), len(second[logging.INFO])] == [1, 0]
    assert "→ wide" in first[logging.INFO][0]
    assert first[logging.WARNING] == []


def test_a_preferred_kernel_of_a_rule_that_was_refused_is_a_warning(logged):
    [line] = logged(_request(), (WIDE, NARROW), rules=_rule("narrow", "wide"), forbidden_adapters=["cast_inputs"])[
        logging.WARNING
    ]
    for words in ("preferred kernel narrow was refused", "dtype=float32", "wide runs instead"):
        assert words in line


def test_a_rule_that_names_an_absent_kernel_warns(logged):
    [line] = logged(_request(), (WIDE,), rules=_rule("wede", "auto"))[logging.WARNING]
    assert "preferred kernel wede was refused" in line
    assert "did you mean 'wide'" in line


def test_a_kernel_after_the_winner_is_no_warning(logged):
    assert logged(_request(), (WIDE, NARROW), rules=_rule("wide", "narrow"))[logging.WARNING] == []


def test_the_shipped_policy_does_not_warn_of_kernels_for_other_hardware(logged):
    kernels = (WIDE, dataclasses.replace(ELSEWHERE, name="dot_product"))
    assert logged(_request(), kernels)[logging.WARNING] == []


def test_the_shipped_policy_warns_of_a_kernel_that_belongs_here(logged):
    kernels = (WIDE, dataclasses.replace(NARROW, name="dot_product"))
    [line] = logged(_request(), kernels, forbidden_adapters=["cast_inputs"])[logging.WARNING]
    assert "preferred kernel dot_product was refused" in line


def test_adapters_that_more_than_double_memory_are_a_warning(logged):
    request = _request(head_dim=8)
    [line] = logged(request, (_spec("padded", head_dims=Dims(minimum=128, maximum=128)),))[logging.WARNING]
    assert "adapters of padded more than double the memory" in line
    assert "pad_head_dim" in line
    assert f"the {array_bytes(request) / 2**20:.1f} MiB of its arrays" in line


def test_adapters_that_add_little_are_no_warning(logged):
    found = logged(_request(q_heads=4, kv_heads=2), (_spec("single"),))
    assert "through repeat_kv_heads" in found[logging.INFO][0]
    assert found[logging.WARNING] == []


def test_bytes_are_those_of_query_key_value_and_out():
    request = Request(batch=2, q_len=3, kv_len=5, q_heads=4, kv_heads=2, head_dim=8, value_dim=6, dtype="bfloat16")
    assert array_bytes(request) == 2 * 2 * (3 * 4 * 8 + 5 * 2 * 8 + 5 * 2 * 6 + 3 * 4 * 6)


def test_a_misspelt_kernel_in_tilings_is_one_warning(logged):
    tilings = (("widee", (("block_q", 64),)),)
    first, second = (logged(_request(), (WIDE,), tilings=tilings)[logging.WARNING] for _ in range(2))
    assert first == ["tilings: no installed kernel is called 'widee'; did you mean 'wide'?"]
    assert second == []


def test_record_sees_a_function_already_jitted():
    call = jax.jit(kernelry.attention)
    query = jnp.ones((1, 4, 1, 8))
    call(query, query, query)
    with kernelry.record() as seen:
        call(query, query, query)
    assert [resolution.kernel for resolution in seen] == ["dot_product"]


@pytest.mark.versions
@pytest.mark.parametrize(("platforms", "named"), [(("tpu",), ["tpu"]), (("cuda", "cpu"), ["gpu"]), (("cpu",), [])])
def test_lowering_for_another_platform_is_noticed_once_and_names_use_target(caplog, platforms, named):
    q = jnp.ones((1, next(_lengths), 1, 8))
    call = jax.jit(lambda q: kernelry.attention(q, q, q))
    for _ in range(2):
        call.trace(q).lower(lowering_platforms=platforms)
    notices = [record.getMessage() for record in caplog.records if "the program is lowered for" in record.getMessage()]
    assert len(notices) == len(named)
    for notice, platform in zip(notices, named, strict=True):
        assert f"was chosen for platform cpu (platform=cpu mode=train B=1 T={q.shape[1]}" in notice
        assert notice.endswith(
            f'lowered for {platform}: trace it within kernelry.use(target="{platform}") to get the kernel for that '
            "platform"
        )


@pytest.mark.versions
def test_lowering_for_another_platform_within_use_target_is_no_news_and_that_of_gradients_is(caplog):
    q = jnp.ones((1, next(_lengths), 1, 8))

    def loss(q):
        return kernelry.attention(q, q, q, kernel="dot_product").sum()

    with kernelry.use(target="tpu:v5e"):
        jax.jit(loss).trace(q).lower(lowering_platforms=("tpu",))
    assert "is lowered for" not in caplog.text
    jax.jit(jax.grad(loss)).trace(q).lower(lowering_platforms=("tpu",))
    assert caplog.text.count("is lowered for tpu") == 1
