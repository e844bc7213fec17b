"""The plugin in tests/fixtures/third_party does what it says; tests/install installs it for real."""

from pathlib import Path

import importlib_metadata
import jax
import numpy as np
import pytest

import kernelry
from kernelry import masks, pictures, testing
from kernelry.masks import BlockKind
from kernelry.masks.parse import parse_form, parse_mask
from kernelry.policy.policy import Policy, Switches
from kernelry.registry import discovery, installed
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.visits import kinds_of, visits_of_queries

pytestmark = pytest.mark.versions

SOURCE = Path(__file__).parents[1] / "fixtures" / "third_party" / "src"


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(str(SOURCE))
    from kernelry_example import plugin

    return plugin


@pytest.fixture
def strided(plugin):
    return plugin.kernelry_masks()["strided"]


def _qkv(q_len=6, kv_len=6, heads=2):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((2, length, heads, 8), np.float32) for length in (q_len, kv_len, kv_len))


def _value_and_grad(mask, kernel):
    def loss(qkv):
        return (kernelry.attention(*qkv, mask=mask, kernel=kernel) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(_qkv())


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=repr)
def test_example_kernel_equals_dot_product(plugin, mask):
    with kernelry.use(kernels=[plugin.REFERENCE]):
        out, grads = _value_and_grad(mask, "example_reference")
    expected, expected_grads = _value_and_grad(mask, "dot_product")
    np.testing.assert_allclose(out, expected, rtol=2e-6)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_example_kernel_statistics_equal_dot_product(plugin):
    with kernelry.use(kernels=[plugin.REFERENCE]):
        part = kernelry.attention(*_qkv(), mask=masks.Causal(), return_partial=True, kernel="example_reference")
    expected = kernelry.attention(*_qkv(), mask=masks.Causal(), return_partial=True, kernel="dot_product")
    np.testing.assert_allclose(part.lse, expected.lse, rtol=2e-6)


def test_example_kernel_carries_its_signature(plugin):
    with kernelry.use("example_reference", kernels=[plugin.REFERENCE]), kernelry.record() as resolutions:
        program = jax.jit(kernelry.attention).lower(*_qkv())
    resolutions[0].verify(program)


@pytest.fixture
def installed_with_ours(plugin, monkeypatch):
    """The plugin in place of what is installed, with the kernels of kernelry-dot-product."""
    ours = [p for p in importlib_metadata.entry_points(group=discovery.GROUP) if p.name == "dot_product"]
    point = importlib_metadata.EntryPoint("example", "kernelry_example.plugin", discovery.GROUP)
    found = discovery.build([*ours, point])
    assert found.faults == ()
    monkeypatch.setattr(installed, "registry", lambda: found)


@pytest.mark.usefixtures("installed_with_ours")
def test_example_preview_is_passed_over_unless_experimental_kernels_are_allowed(fresh_request):
    usual = kernelry.explain(fresh_request, policy=Policy.shipped(switches=Switches()))
    assert usual.kernel in {"dot_product", "blockwise"}
    assert usual.rule.startswith("shipped policy: ")
    assert "example_preview: passed over: first release, tested on one machine; it serves with" in str(usual)
    allowed = kernelry.explain(fresh_request, policy=Policy.shipped(switches=Switches(experimental=True)))
    assert (allowed.kernel, allowed.rule) == ("example_preview", "votes of plugins: example (its author's guess)")
    assert "reservation: first release, tested on one machine" in str(allowed)


@pytest.mark.usefixtures("installed_with_ours")
def test_example_preview_serves_who_names_it():
    with kernelry.record() as resolutions:
        out = kernelry.attention(*_qkv(), mask=masks.Causal(), kernel="example_preview")
    assert resolutions[0].winner.reservations
    expected = kernelry.attention(*_qkv(), mask=masks.Causal(), kernel="dot_product")
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("argument", [{"scale": 0.5}, {"soft_cap": 3.0}, {"mask": masks.SlidingWindow(1)}], ids=str)
def test_example_kernel_refuses_what_it_does_not_declare(plugin, argument):
    with (
        kernelry.use(kernels=[plugin.REFERENCE]),
        pytest.raises(kernelry.errors.KernelRefusedError, match="example_reference"),
    ):
        kernelry.attention(*_qkv(), **argument, kernel="example_reference")


def test_example_mask_looks_like_its_picture(strided):
    picture = [line.split() for line in strided.__doc__.splitlines() if line.strip()[:1] in ("1", ".")]
    np.testing.assert_array_equal(strided(2).materialize(4, 4)[0, 0], np.array(picture) == "1")


def test_example_mask_equals_dense(strided):
    mask = strided(3) & masks.Causal()
    seen = np.array([[(p - k) % 3 == 0 and k <= p for k in range(6)] for p in range(6)])
    out = kernelry.attention(*_qkv(), mask=mask, kernel="dot_product")
    expected = kernelry.attention(*_qkv(), mask=masks.Dense(seen[None, None]), kernel="dot_product")
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_example_mask_moves_with_at(strided):
    seen = np.array([[(p - k) % 3 == 0 for k in range(6)] for p in (4, 5)])
    out = kernelry.attention(*_qkv(q_len=2), mask=strided(3).at(query_offset=4), kernel="dot_product")
    expected = kernelry.attention(*_qkv(q_len=2), mask=masks.Dense(seen[None, None]), kernel="dot_product")
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_example_mask_is_static_under_jit(strided):
    run = jax.jit(lambda mask, *qkv: kernelry.attention(*qkv, mask=mask, kernel="dot_product"))
    out = run(strided(2), *_qkv())
    np.testing.assert_allclose(out, kernelry.attention(*_qkv(), mask=strided(2), kernel="dot_product"), rtol=1e-6)


def test_example_mask_without_a_step_raises(strided):
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        strided(0)


def test_example_mask_is_parsed_by_its_word_and_by_its_repr(plugin, strided):
    known = plugin.kernelry_masks()
    mask = strided(3) & masks.Causal()
    for text in ("strided(3) & causal", "Strided(3) & Causal()", "strided(step=3) & causal"):
        assert parse_mask(text, known) == mask.__class__((strided(3), masks.Causal()))
        assert parse_form(text, known) == mask.form


def test_example_mask_is_drawn(strided):
    drawn = pictures.text(strided(2), 4).splitlines()
    assert drawn[0] == "custom(strided, 2)"
    assert drawn[3:7] == ["1 . 1 .", ". 1 . 1", "1 . 1 .", ". 1 . 1"]


def test_example_mask_survives_json(strided):
    form = (strided(2) & masks.Causal()).form
    assert masks.MaskForm.from_json(form.to_json()) == form


def test_blocks_that_the_example_mask_empties_are_known(strided):
    empty, partial = BlockKind.EMPTY, BlockKind.PARTIAL
    kinds = (strided(8) & masks.Causal()).block_map(12, 12, 2, 2)
    expected = [[partial if i >= j and (i - j) % 4 == 0 else empty for j in range(6)] for i in range(6)]
    np.testing.assert_array_equal(kinds, expected)


def test_blockwise_visits_no_block_that_the_example_mask_empties(strided):
    grid = Grid(q_len=64, kv_len=64, block_q=8, block_kv=8)
    visits = visits_of_queries(kinds_of(strided(32).canonical(), grid))
    assert not visits.any_full
    np.testing.assert_array_equal(visits.some[0], [2] * 8)  # of 8


@pytest.mark.parametrize("kernel", ["splash", "pallas_flash", "blockwise", "dot_product"])
@pytest.mark.parametrize("length", [128, 100])
def test_example_mask_is_served_as_a_predicate(strided, kernel, length):
    mask = strided(3) & masks.Causal()
    rng = np.random.default_rng(0)
    qkv = tuple(rng.standard_normal((1, length, 1, 128), np.float32) for _ in range(3))
    with testing.interpret(), kernelry.record() as resolutions:
        out = jax.jit(lambda qkv: kernelry.attention(*qkv, mask=mask, kernel=kernel))(qkv)
    steps = {step.adapter.name for step in resolutions[0].plan.steps}
    assert steps <= {"pad_sequence"}
    assert ("pad_sequence" in steps) == (kernel == "splash" and length == 100)
    np.testing.assert_allclose(out, testing.reference_attention(*qkv, mask=mask).out, rtol=2e-5, atol=2e-5)


def test_example_mask_leaves_no_row_without_a_key(strided):
    form = (strided(3) & masks.Causal()).form
    assert not form.may_have_empty_rows(8, 8)
    assert not form.may_hide_slots(8, 8)
    assert (strided(3) & masks.Causal().at(query_offset=2)).form.may_have_empty_rows(8, 8)
