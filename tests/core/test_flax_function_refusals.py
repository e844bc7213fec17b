"""What `attention_fn` cannot honour is refused, with what to do instead."""

import sys

import jax
import jax.numpy as jnp
import pytest
from flax_cases import B, F, T, array, linen_mha, nnx_mha, qkv

from kernelry.config import AttentionConfig, AttentionType, MoBA
from kernelry.errors import ArgumentError, ShapeError
from kernelry.flax import attention_fn


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("module", "leave it False"),
        ("input_positions", "dot_product_attention_with_rope"),
        ("einsum_dot_general", "use precision="),
        ("qk_attn_weights_einsum", "leave qk_attn_weights_einsum_cls None"),
        ("attn_weights_value_einsum", "leave attn_weights_value_einsum_cls None"),
    ],
)
def test_what_no_kernel_can_honour_is_refused(name, advice):
    with pytest.raises(ArgumentError, match=rf"attention_fn got {name}=.*{advice}"):
        attention_fn(*qkv(B), **{name: jnp.arange(T)})


def test_nnx_sow_weights_is_refused():
    with pytest.raises(ArgumentError, match="sow_weights"):
        nnx_mha(attention_fn)(array(B, T, F), sow_weights=True)


def test_linen_sow_weights_is_refused():
    with pytest.raises(ArgumentError, match="sow_weights"):
        linen_mha(attention_fn).init(jax.random.key(0), array(B, T, F), sow_weights=True)


def test_linen_custom_einsum_is_refused():
    module = linen_mha(
        attention_fn,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(ArgumentError, match="qk_attn_weights_einsum"):
        module.init(jax.random.key(0), array(B, T, F))


def test_two_precisions_are_refused():
    with pytest.raises(ArgumentError, match="one precision for both"):
        attention_fn(*qkv(B), precision=("high", "default"))


def test_is_causal_with_unequal_lengths_is_refused():
    with pytest.raises(ShapeError, match=r"layer_mask=masks.Causal\(\).at\(query_offset=11\)"):
        attention_fn(*qkv(B, q_len=1), is_causal=True)


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword"):
        attention_fn(*qkv(B), window=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("type", AttentionType.FULL),
        ("soft_cap", 5.0),
        ("scale", 0.5),
        ("sinks", True),
        ("moba", MoBA(4, 2)),
        ("record_max_logits", True),
        ("dropout_rate", 0.5),
        ("logits_dtype", "bfloat16"),
        ("precision", "highest"),
    ],
)
def test_an_option_of_the_layer_in_its_config_is_refused(name, value):
    with pytest.raises(ArgumentError, match=rf"config.{name}=.*functools.partial"):
        attention_fn(*qkv(B), config=AttentionConfig(**{name: value}))


@pytest.mark.parametrize("shape", [(3, 1, T, T), (1, 1, 1, 1, T, T)])
def test_a_mask_that_does_not_broadcast_is_refused(shape):
    with pytest.raises(ShapeError, match="mask must broadcast to"):
        attention_fn(*qkv(B), mask=jnp.ones(shape))


def test_different_batches_are_refused():
    q, k, v = qkv(B)
    with pytest.raises(ShapeError, match="got value of shape"):
        attention_fn(q, k, v[:1])
    with pytest.raises(ShapeError, match="got query of shape"):
        attention_fn(q[0, 0], k, v)


def test_without_flax_the_import_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("kernelry.flax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"pip install 'kernelry\[flax\]'"):
        import kernelry.flax  # noqa: F401
