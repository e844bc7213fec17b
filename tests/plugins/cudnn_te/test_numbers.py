"""cudnn_te with attention in plain JAX where cuDNN would be: the plumbing's numbers, not cuDNN's."""

import cudnn_te_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.errors import ConfigError, KernelRefusedError

SINKS = np.asarray([0.3, -1.0, 2.0, 0.0], np.float32)

NEWEST = pytest.mark.te(since="2.20")  # what no release does otherwise is computed beside one
MOST_TOLD = ("window, lengths", "causal, packed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:TransformerEngine logical axes:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:adapters of cudnn_te_in_float32 more than double:UserWarning"),
    pytest.mark.te(served=True),
]


def _bias(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    "name", [name if name in MOST_TOLD else pytest.param(name, marks=NEWEST) for name in cases.MASKS]
)
def test_masks(name):
    steps = cases.check(mask=cases.MASKS[name])
    assert steps == (["clean_hidden_slots"] if "lengths" in name or "packed" in name else [])


@pytest.mark.parametrize("name", ["causal, packed", *(pytest.param(n, marks=NEWEST) for n in ("causal", "lengths"))])
def test_statistics_and_the_backward_pass_from_them(name):
    steps = cases.check(mask=cases.MASKS[name], return_partial=True)
    assert steps[-1] == "lse_gradient_column"


@pytest.mark.parametrize(
    "name", ["causal, lengths", *(pytest.param(name, marks=NEWEST) for name in ("full", "window", "causal, packed"))]
)
def test_sinks(name):
    assert "sinks_from_lse" not in cases.check(mask=cases.MASKS[name], sinks=jnp.asarray(SINKS))


@pytest.mark.parametrize(
    "shape", [(1, 4, 1, 32), *(pytest.param(shape, marks=NEWEST) for shape in ((1, 4, 32, 32), (1, 4, 32, 1)))], ids=str
)
def test_bias_has_its_gradient_along_what_it_is_broadcast_to(shape):
    cases.check(mask=masks.Causal(), bias=_bias(*shape))


@NEWEST
@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (1, 1, 32, 32), (2, 1, 1, 32)], ids=str)
def test_bias_without_gradient(shape):
    bias = _bias(*shape)
    *operands, d_out = cases.arrays()
    given = {"mask": masks.Causal(), "gradients": ("query", "key", "value")}

    def attend(kernel):
        return jax.jit(
            jax.grad(lambda q: (kernelry.attention(q, *operands[1:], kernel=kernel, bias=bias, **given) * d_out).sum())
        )(operands[0])

    with kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        found = attend(cases.IN_FLOAT32.name)
    cases.same(found, attend("dot_product"))


@NEWEST
def test_bias_in_the_backward_pass_from_statistics():
    cases.check(mask=masks.Causal(), bias=_bias(1, 4, 1, 32), return_partial=True)


@pytest.mark.parametrize(
    ("lengths", "mask"),
    [
        ((16, 32), masks.Causal().at(query_offset=16)),
        ((16, 32), masks.Causal().at(query_offset=0)),
        ((16, 32), masks.SlidingWindow(5).at(query_offset=16)),
        ((32, 16), masks.SlidingWindow(3).at(query_offset=0)),
        ((32, 16), masks.Full()),
    ],
    ids=str,
)
def test_queries_and_keys_of_different_lengths(lengths, mask):
    cases.check(cases.arrays(*lengths), mask=mask)


@NEWEST
@pytest.mark.parametrize("dims", [(24, 16), (16, 24), (16, 12)])
def test_values_of_another_dim(dims):
    cases.check(cases.arrays(head_dim=dims[0], value_dim=dims[1]), mask=masks.Causal())


@NEWEST
@pytest.mark.parametrize("name", ["full", "causal", "window"])
def test_largest_logits_of_each_row_of_a_batch(name):
    cases.check(mask=cases.MASKS[name], return_max_logits=True, bias=_bias(1, 4, 1, 32))


@NEWEST
def test_largest_logits_beside_sinks_and_statistics():
    assert cases.check(mask=masks.Causal(), return_max_logits=True, sinks=jnp.asarray(SINKS)) == ["sinks_from_lse"]
    cases.check(mask=masks.Causal(), return_max_logits=True, return_partial=True)


@NEWEST
@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (masks.Lengths(jnp.asarray([0])), -np.inf),
        (masks.Segments(jnp.full(32, -1)), -np.inf),
        (masks.Segments(jnp.asarray([0, 1] * 16)), np.nan),
    ],
    ids=["no keys", "no segments", "not in order"],
)
def test_largest_logits_where_nothing_is_visible_and_where_ids_are_not_in_order(mask, wanted):
    *operands, _ = cases.arrays(batch=1)
    options = {"kernel": cases.IN_FLOAT32.name, "mask": mask, "mode": "prefill", "return_max_logits": True}
    # transformer-engine's own reduction of packed rows promotes ranks.
    with kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]), jax.numpy_rank_promotion("allow"):
        _, largest = jax.jit(lambda *qkv: kernelry.attention(*qkv, **options))(*operands)
    np.testing.assert_array_equal(largest, np.full((1, 4), wanted))


def test_a_bias_beyond_float16_becomes_its_limit():
    """Else a row whose keys are all as good as hidden would sum to 0."""
    *operands, _ = cases.arrays(batch=1, dtype="float16")
    bias = jnp.full((1, 4, 32, 32), -1e9)
    options = {"bias": bias, "mode": "prefill"}
    with kernelry.use(target=cases.TARGET):
        found = jax.jit(lambda *qkv: kernelry.attention(*qkv, kernel="cudnn_te", **options))(*operands)
    mean = jnp.repeat(operands[2].astype(jnp.float32).mean(1, keepdims=True), 2, axis=2)
    assert np.abs(found.astype(jnp.float32)).min() > 0
    assert np.abs(found - mean).max() < 2.0  # their mean, by what a float32 near 65504 still tells apart


@pytest.mark.te(before="2.20")
def test_largest_logits_of_an_older_release_are_an_error_that_says_so():
    with pytest.raises(ConfigError, match=r"transformer-engine 2\.\d+\.\d+ does not have return_max_logit"):
        cases.check(mask=masks.Causal(), return_max_logits=True)


@NEWEST
@pytest.mark.parametrize("ids", [[0, 1, 0], [-1, -1, -1], [5, 5, -1]], ids=str)
def test_packed_rows_are_whole_or_nothing(ids):
    """Ids that come again after others are no packed row: no number comes out that could be taken for one."""
    rows = jnp.asarray(np.repeat(ids, [8, 16, 8])[None])
    *operands, _ = cases.arrays(batch=1)
    options = {"mask": masks.Segments(rows), "mode": "prefill"}
    with kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        found = jax.jit(lambda q, k, v: kernelry.attention(q, k, v, kernel=cases.IN_FLOAT32.name, **options))(*operands)
    if ids == [0, 1, 0]:
        assert np.isnan(found).all()
    else:
        cases.same(found, kernelry.attention(*operands, kernel="dot_product", **options))


def test_gradients_of_ids_that_break_a_packed_row_are_no_numbers_either():
    rows = jnp.asarray(np.repeat([0, 1, 0], [8, 16, 8])[None])
    *operands, d_out = cases.arrays(batch=1)
    with kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        _, gradients = cases.results(cases.IN_FLOAT32.name, operands, d_out, mask=masks.Segments(rows))
    assert all(np.isnan(gradient).all() for gradient in gradients)


def test_more_segments_than_the_tiling_allows_are_no_numbers():
    rows = jnp.asarray(np.repeat(np.arange(4), 8)[None])
    *operands, _ = cases.arrays(batch=1)

    def attend(q, k, v):
        return kernelry.attention(q, k, v, kernel=cases.IN_FLOAT32.name, mask=masks.Segments(rows), mode="prefill")

    for most in (3, 4):
        with kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32], tiling={"max_segments": most}):
            assert bool(np.isnan(jax.jit(attend)(*operands)).all()) is (most == 3)


@pytest.mark.parametrize(
    ("axes", "mask"),
    [
        ((0, 0, 0, 0), masks.Causal()),
        ((0, None, None, 0), masks.Causal()),
        ((None, None, None, 0), masks.Causal()),
        ((0, 1, 0, 0), masks.Lengths(jnp.asarray([5, 9]))),
    ],
    ids=str,
)
def test_vmap(axes, mask):
    stacked = [jnp.stack([array, 0.5 * array]) for array in cases.arrays()]
    given = [
        array[0] if axis is None else jnp.moveaxis(array, 0, axis) for array, axis in zip(stacked, axes, strict=True)
    ]

    def run(kernel):
        def one(q, k, v, d_out):
            out, pull = jax.vjp(lambda *qkv: kernelry.attention(*qkv, kernel=kernel, mask=mask), q, k, v)
            return out, pull(d_out)

        return jax.jit(jax.vmap(one, axes))(*given)

    with kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        found = run(cases.IN_FLOAT32.name)
    cases.same(found, run("dot_product"))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sinks": jnp.asarray(SINKS)}, "sinks"),
        ({"bias": _bias(1, 4, 32, 32)}, "a bias"),
        ({"mask": cases.MASKS["packed"]}, "packed rows"),
        ({"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}, "dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_vmap_is_refused_where_transformer_engine_has_no_rule(options, what):
    stacked = [jnp.stack([array, array]) for array in cases.arrays()[:3]]

    def attend(*qkv):
        return kernelry.attention(*qkv, kernel=cases.IN_FLOAT32.name, **options)

    with (
        kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]),
        pytest.raises(KernelRefusedError, match=f"jax.vmap over a call with {what}"),
    ):
        jax.vmap(attend)(*stacked)


@pytest.mark.parametrize("name", ["sinks", "bias", "dropout_rng"])
def test_vmap_is_refused_where_only_what_has_no_rule_is_mapped(name):
    *operands, _ = cases.arrays()
    given = {
        "sinks": jnp.asarray([SINKS, SINKS]),
        "bias": _bias(2, 1, 4, 32, 32),
        "dropout_rng": jax.random.split(jax.random.key(0)),
    }[name]
    options = {"dropout_rate": 0.5} if name == "dropout_rng" else {}

    def attend(given):
        return kernelry.attention(*operands, kernel=cases.IN_FLOAT32.name, **options, **{name: given})

    with (
        kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]),
        pytest.raises(KernelRefusedError, match=r"jax\.vmap over a call with"),
    ):
        jax.eval_shape(jax.vmap(attend), given)
