"""Bad input to attention: the message names the argument, what it was and what it must be."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernelry
from kernelry import Request, masks
from kernelry.cache import RollingCache
from kernelry.config import AttentionConfig, load_config
from kernelry.errors import ArgumentError, ConfigError, ShapeError
from kernelry.plugin import KernelSpec

Q = jnp.ones((2, 6, 4, 8))
K = jnp.ones((2, 6, 2, 8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": Q[0]}, ["query", "[B, T, N, H]", "(6, 4, 8)"]),
        ({"key": K[..., 0]}, ["key", "[B, S, K, H]", "(2, 6, 2)"]),
        ({"value": K[None]}, ["value", "[B, S, K, D]", "(1, 2, 6, 2, 8)"]),
        ({"query": [[1.0]]}, ["query must be an array", "list"]),
        ({"query": Q.astype(jnp.int32)}, ["query must be floating", "int32"]),
        ({"key": K.astype(jnp.bfloat16)}, ["key", "float32", "bfloat16"]),
        ({"value": K.astype(jnp.float16)}, ["value", "float32", "float16"]),
        ({"key": K[:1]}, ["key", "B=2", "(1, 6, 2, 8)"]),
        ({"value": K[:1]}, ["value", "B=2", "(1, 6, 2, 8)"]),
        ({"key": K[..., :4]}, ["key", "H=8", "(2, 6, 2, 4)"]),
        ({"value": K[:, :4]}, ["value", "S=6", "(2, 4, 2, 8)"]),
        ({"value": K[:, :, :1]}, ["value", "K=2", "(2, 6, 1, 8)"]),
        ({"key": jnp.ones((2, 6, 3, 8)), "value": jnp.ones((2, 6, 3, 8))}, ["key", "K=3", "N=4"]),
        ({"mask": masks.Dense(np.ones((3, 1, 6, 6), bool))}, ["visible", "(2, 4, 6, 6)", "(3, 1, 6, 6)"]),
        ({"mask": masks.Segments(np.zeros((2, 5), int))}, ["query_ids", "[2, 6]", "(2, 5)"]),
        ({"mask": masks.Lengths(np.zeros(3, int))}, ["kv_lengths", "[2]", "(3,)"]),
        ({"query": Q[:, :3], "mask": masks.Causal()}, ["Causal()", "T=3", "S=6", "query_offset=3"]),
        ({"query": Q[:, :3], "mask": masks.Full() & ~masks.SlidingWindow(2)}, ["T=3", "S=6", "query_offset"]),
        ({"bias": jnp.ones((6, 5))}, ["bias", "(2, 4, 6, 6)", "(6, 5)"]),
        ({"bias": jnp.ones((1, 1, 1, 6, 6))}, ["bias", "(1, 1, 1, 6, 6)"]),
        ({"bias": jnp.ones((6, 6), bool)}, ["bias must be floating", "bool", "masks.Dense"]),
        ({"sinks": jnp.ones(2)}, ["sinks", "[4]", "(2,)"]),
        ({"sinks": jnp.ones((1, 4))}, ["sinks", "rank 1", "(1, 4)"]),
    ],
)
def test_misfits_raise_shape_errors_that_name_the_argument(change, words):
    arguments = {"query": Q, "key": K, "value": K, **change}
    with pytest.raises(ShapeError) as caught:
        jax.jit(lambda: kernelry.attention(**arguments))()
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mode": "trian"}, "unknown mode 'trian'; did you mean 'train'"),
        ({"soft_cap": 0.0}, "soft_cap must be positive, got 0.0"),
        ({"soft_cap": -1.0}, "soft_cap must be positive"),
        ({"bias_after_cap": 1}, "bias_after_cap must be True or False, got 1"),
        ({"dropout_rate": 1.0}, "dropout_rate must be in"),
        ({"dropout_rate": 0.1}, "needs dropout_rng"),
        ({"normalization": "softmx"}, "did you mean 'softmax'"),
        ({"gradients": ["querry"]}, "did you mean 'query'"),
        ({"gradients": "query"}, "gradients must be names of operands"),
        ({"gradients": 3}, "gradients must be names of operands"),
        ({"scale": True}, "scale must be a finite number"),
        ({"dropout_rate": 0.1, "dropout_rng": 3}, "dropout_rng must be one PRNG key"),
        ({"dropout_rate": 0.1, "dropout_rng": jnp.zeros(5)}, "dropout_rng must be one PRNG key"),
        (
            {"dropout_rate": 0.1, "dropout_rng": jax.random.split(jax.random.key(0), 2)},
            "dropout_rng must be one PRNG key",
        ),
        ({"sinks": jnp.ones(4), "return_partial": True}, "kernelry.finalize"),
        ({"scale": "x"}, "scale must be a finite number"),
        ({"scale": jnp.ones(2)}, "scale must be a finite number"),
        ({"soft_cap": float("inf")}, "soft_cap must be a finite number"),
        ({"dropout_rate": "a"}, "dropout_rate must be a finite number"),
        ({"kernel": None}, "kernel must be a name or 'auto', got None"),
        ({"precision": "hihgest"}, "did you mean 'highest'"),
        ({"logits_dtype": "foo"}, "logits_dtype='foo' is not a dtype"),
        ({"logits_dtype": jnp.int32}, "logits_dtype must be floating, got int32"),
        ({"logits_dtype": "float64"}, "logits_dtype=float64 needs 64-bit types"),
        ({"normalization": None}, "unknown normalization None"),
    ],
)
def test_meaningless_values_raise_argument_errors(change, complaint):
    with pytest.raises(ArgumentError, match=re.escape(complaint)):
        kernelry.attention(Q, K, K, **change)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        (
            "scale",
            "multiply query by it and pass scale=1.0, or make it static, as in jax.jit(f, static_argnames='scale')",
        ),
        ("soft_cap", "make it static, as in jax.jit(f, static_argnames='soft_cap')"),
        ("dropout_rate", "make it static, as in jax.jit(f, static_argnames='dropout_rate')"),
    ],
)
def test_traced_numbers_are_refused_before_jax_complains(name, instead):
    with pytest.raises(ArgumentError) as caught:
        jax.jit(lambda number: kernelry.attention(Q, K, K, **{name: number}))(0.5)
    assert str(caught.value) == f"{name} must be a Python number, got a traced array: {instead}."


def test_numbers_may_be_arrays_of_rank_0():
    kernelry.attention(Q, K, K, scale=1 / jnp.sqrt(8.0), soft_cap=np.float32(3))


def test_positional_masks_with_at_accept_unequal_lengths():
    assert kernelry.attention(Q[:, :3], K, K, mask=masks.Causal().at(query_offset=3)).shape == (2, 3, 4, 8)


# What people write in their first minutes, and the words that say what to write instead.

TRUE = np.ones((2, 6, 6), bool)
ROWS = np.ones((2, 6), bool)
MASK = "mask must be a kernelry mask, got "
BOOLEANS = (
    "mask as a boolean array must be [T, S] or broadcast to B N T S = (2, 4, 6, 6), got shape {}; for [B, S] write "
    "mask[:, None, None], for [B, T, S] mask[:, None], for [T, S] mask[None, None]."
)
TRANSPOSED = "so arrays [B, heads, tokens, H], as in torch, go through .swapaxes(1, 2)."
CACHE = RollingCache.create(batch=2, window=8, kv_heads=2, head_dim=8, dtype=jnp.float32)
SPEC = KernelSpec(name="mine", capabilities=None, load="absent:Absent", signature=None)


def attend(query=Q, key=K, value=K, **options):
    return kernelry.attention(query, key, value, **options)


def used(**options):
    with kernelry.use(**options):
        pass


def at(**where):
    return masks.Causal().at(**where)


def heads_first(*arrays, **options):
    return attend(*(np.ones(shape, np.float32) for shape in arrays), **options)


MISTAKES = [
    (
        lambda: attend(Q[0], K[0], K[0]),
        "got shape (6, 4, 8); without a batch write query[None], key[None], value[None]",
    ),
    (lambda: attend(key=K[:, :, 0]), "got shape (2, 6, 8); without a batch write query[None], key[None], value[None]"),
    (lambda: attend(key=K[:, :, 0]), "one head without an axis is key[:, :, None]."),
    (lambda: attend(Q.reshape(2, 6, 2, 2, 8)), "heads in groups [B, T, K, G, H] are query.reshape(B, T, K * G, H)."),
    (lambda: heads_first((2, 4, 1, 8), (2, 2, 6, 8), (2, 2, 6, 8)), TRANSPOSED),
    (lambda: heads_first((2, 6, 4, 8), (2, 2, 6, 8), (2, 2, 6, 8)), TRANSPOSED),
    (
        lambda: heads_first((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), mask=masks.Causal()),
        "arrays [B, heads, tokens, H], as in torch, go through .swapaxes(1, 2).",
    ),
    (lambda: attend([[1.0]]), "query must be an array, got list; write jnp.asarray(query)."),
    (lambda: attend(value=None), "value must be an array, got NoneType."),
    (
        lambda: attend(jax.ShapeDtypeStruct(Q.shape, Q.dtype)),
        "go through jax.eval_shape(kernelry.attention, …), facts in",
    ),
    (
        lambda: attend(key=CACHE),
        "key must be an array, got RollingCache; a cache attends by itself: cache.attend(query",
    ),
    (lambda: attend(Q.astype(int)), "query must be floating, got int32; cast it, e.g. query.astype(jnp.bfloat16)."),
    (
        lambda: attend(key=K.astype(jnp.bfloat16)),
        "must have query's dtype float32, got bfloat16; write key.astype(query.d",
    ),
    (lambda: attend(mask=masks.Causal), MASK + "the class Causal; write masks.Causal()."),
    (lambda: attend(mask=masks.Segments), MASK + "the class Segments; write masks.Segments(…)."),
    (lambda: attend(mask="causal"), MASK + "'causal'; write masks.Causal()."),
    (lambda: attend(mask="sliding_window"), MASK + "'sliding_window'; write masks.SlidingWindow(…)."),
    (lambda: attend(mask="zzz"), MASK + "'zzz'; masks are in kernelry.masks."),
    (lambda: attend(mask=True), MASK + "True; without a mask every key is seen, and masks.Causal() hides those after"),
    (lambda: attend(mask=lambda q, k: q >= k), MASK + "function; write masks.Predicate(fn)."),
    (lambda: attend(mask=np.tril(np.ones((6, 6), bool)).tolist()), MASK + "list; write jnp.asarray(mask)."),
    (
        lambda: attend(mask=(masks.Causal(), masks.Lengths(3))),
        MASK + "a tuple of masks; compose them with &, e.g. Causal() & Lengths(3).",
    ),
    (
        lambda: attend(mask=np.ones((2, 6), np.int32)),
        MASK + "int32 of shape (2, 6); for segment ids write masks.Segments(ids), for padding of 0 and 1 [B, S] array[",
    ),
    (lambda: attend(mask=at(query_positions=np.arange(16))), "query_positions must be [6] or [2, 6], got shape (16,)."),
    (lambda: kernelry.flax.AttentionOp()(Q[0], K, K), "query must be [B, T, N, H], rank 4, got shape (6, 4, 8); "),
    (lambda: kernelry.flax.AttentionOp()(Q, K, K, mask=ROWS), BOOLEANS.format("(2, 6)")),
    (
        lambda: kernelry.flax.AttentionOp(mask=lambda q, k: q >= k)(Q, K, K),
        MASK + "function; write masks.Predicate(fn)",
    ),
    (
        lambda: attend(mask=jnp.ones((6, 6))),
        MASK + "float32 of shape (6, 6); for 0 and 1 write masks.Dense(array > 0), n",
    ),
    (lambda: attend(mask=TRUE), BOOLEANS.format("(2, 6, 6)")),
    (lambda: attend(mask=ROWS), BOOLEANS.format("(2, 6)")),
    (
        lambda: heads_first(*[(6, 6, 2, 8)] * 3, mask=TRUE[0]),
        "must be [T, S] or broadcast to B N T S = (6, 2, 6, 6), got",
    ),
    (lambda: attend(mask=masks.Dense(TRUE)), "got shape (1, 2, 6, 6); for [B, T, S] write array[:, None]."),
    (lambda: attend(mask=masks.Dense(ROWS)), "got shape (1, 1, 2, 6); for [B, S] write array[:, None, None]."),
    (
        lambda: masks.Causal & masks.Segments([0]),
        "a mask composes with masks, got the class Causal; write masks.Causal()",
    ),
    (
        lambda: masks.Causal() | ROWS,
        "a mask composes with masks, got booleans of shape (2, 6); write masks.Dense(array).",
    ),
    (lambda: attend(bias=jnp.zeros((2, 6, 6))), "got shape (2, 6, 6); for [B, T, S] write bias[:, None]."),
    (
        lambda: attend(bias=[[0.0]]),
        "bias must be an array that broadcasts to B N T S = (2, 4, 6, 6), got list; write jnp.",
    ),
    (lambda: attend(sinks=[0.0] * 4), "sinks must be an array, got list; write jnp.asarray(sinks)."),
    (lambda: attend(mode="training"), "unknown mode 'training'; did you mean 'train'?"),
    (
        lambda: attend(kernel=SPEC),
        "got KernelSpec 'mine'; write kernel='mine', inside kernelry.use(kernels=[spec]) where",
    ),
    (lambda: attend(kernel=kernelry.kernels()[0]), "InstalledKernel 'blockwise'; write kernel='blockwise'."),
    (lambda: attend(dropout_rate=0.1, dropout_rng=nnx.Rngs(0)), "got Rngs; draw a key from it, e.g. rngs.dropout()."),
    (lambda: attend(dropout_rate=0.1, dropout_rng=jnp.zeros(3)), "jax.random.key(0), got float32 of shape (3,)."),
    (lambda: attend(soft_cap=0), "soft_cap must be positive, got 0.0; pass None for no cap."),
    (
        lambda: kernelry.merge(attend(return_partial=True)),
        "merge takes a sequence of Partials, got one Partial; write mer",
    ),
    (lambda: used(kernel=SPEC), "got KernelSpec 'mine'; write kernel='mine', inside kernelry.use(kernels=[spec])"),
    (
        lambda: used(kernels=[SPEC]),
        "kernel 'mine' cannot be used: signature must be a function, got None; pass a function as signature=; "
        "capabilities must be Capabilities, got None; pass a Capabilities.",
    ),
    (
        lambda: used(kernels=SPEC),
        "use(kernels=…) takes a sequence of KernelSpecs, got one; write kernels=[spec] for 'mine'.",
    ),
    (
        lambda: used(policy=AttentionConfig()),
        "policy must be a Policy, got AttentionConfig; write policy=config.policy.",
    ),
    (lambda: used(policy="c.toml"), "got str; read one with kernelry.config.load_config(source).policy."),
    (lambda: used(tiling=128), "use(tiling=…) takes tunables by name, e.g. {'block_q': 128}, got 128."),
    (lambda: used(strict=True), "use(strict=…) takes a lock file, as `kernelry lock` writes it, got True."),
    (lambda: used(target="h100"), "target 'h100': unknown platform 'h100'; write 'gpu:h100'"),
    (
        lambda: kernelry.explain("gpu"),
        "request must be a kernelry.Request, e.g. Request(q_len=1024, target='gpu:h100'), ",
    ),
    (lambda: kernelry.resolve(Request(q_len=4), kernel=SPEC), "got KernelSpec 'mine'; write kernel='mine'"),
    (
        lambda: kernelry.explain(Request(q_len=4), policy={}),
        "policy must be a Policy, got dict; read one with kernelry.c",
    ),
    (
        lambda: kernelry.resolve_phases("c.toml", None),
        "got str; a file or a mapping is read by kernelry.config.load_conf",
    ),
    (lambda: kernelry.resolve_phases(AttentionConfig(), {}), "shape must be a kernelry.ModelShape, got dict."),
    (
        lambda: kernelry.flax.AttentionOp("c.toml"),
        "config must be a kernelry.config.AttentionConfig, got str; a file or a",
    ),
    (lambda: kernelry.flax.AttentionOp()(Q, K, K, mask=masks.Causal), MASK + "the class Causal; write masks.Causal()."),
    (lambda: kernelry.flax.attention_fn(Q, Q, Q, mask=masks.Causal), "got the class Causal; write masks.Causal()."),
    (lambda: CACHE.attend(Q[:, :1], mask=masks.Causal), MASK + "the class Causal; write masks.Causal()."),
    (lambda: Request(q_len=8, mask=masks.Causal), MASK + "the class Causal; write masks.Causal()."),
    (
        lambda: Request(q_len=1, kv_len=100, mask=masks.Causal(), mode="decode"),
        "key has S=100: say where the queries stand, e.g. mask.at(query_offset=99).",
    ),
    (lambda: Request(q_len=8, mode=np.arange(3)), "unknown mode array([0, 1, 2])"),
    (
        lambda: Request(q_len=8, gradients=jnp.int32(4)),
        "gradients must be names of operands, e.g. ('query', 'bias'), got",
    ),
    (lambda: kernelry.flax.AttentionOp()(Q, K, K, gradients="query"), "gradients must be names of operands, e.g. ("),
    (lambda: Request(q_len=10**400), "q_len must be below 2**63"),
    (lambda: AttentionConfig(source=[]), "source must be text, e.g. a file's name, got []."),
    (lambda: AttentionConfig(scale=10**400), "scale must be a finite number or none, got 1"),
    (lambda: kernelry.attention(Q, K, K, scale=10**400), "scale must be a finite number, got 1"),
    (lambda: kernelry.attention(Q, K, K, soft_cap=10**400), "soft_cap must be a finite number, got 1"),
    (
        lambda: kernelry.config.from_maxtext({"attn_logits_soft_cap": 10**400}),
        "attn_logits_soft_cap must be a finite number, or none, got 1",
    ),
    (lambda: AttentionConfig(thresholds={1: 2}), "thresholds must be numbers by name, got {1: 2}."),
    (lambda: kernelry.config.load_config("\0.toml"), "cannot read the config '\\x00.toml': embedded null byte."),
    (
        lambda: kernelry.config.load_config({}, table=[]),
        "load_config takes a path or a mapping, and a table's name, got",
    ),
    (
        lambda: kernelry.config.load_maxtext(3),
        "load_maxtext takes the paths of MaxText's files, got 3; pass a mapping to from_maxtext.",
    ),
    (lambda: Request(q_len=8, dtype=float), "dtype must be the name of a dtype, e.g. bfloat16, got <class 'float'>."),
    (lambda: Request(q_len=6, bias=jnp.ones((6, 6))), "of B=1 N=1 T=6 S=6, got an array of shape (6, 6)."),
    (lambda: Request(q_len=6, sinks=jnp.ones(1)), "sinks must be True or False, got an array of shape (1,)."),
    (
        lambda: Request(q_len=8, mask=at(query_positions=np.arange(6))),
        "mask: query_positions are 6 numbers, and q_len=8: give one position for each of the T tokens, or pass q_len=",
    ),
    (
        lambda: Request(q_len=8, mask=~at(kv_positions=range(6))),
        "kv_positions are 6 numbers, and kv_len=8",
    ),
    (
        lambda: Request(q_len=8, mask=at(query_offset=[1, 2])),
        "differ between 2 rows, and batch=1: pass batch=2, or posit",
    ),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_first_mistakes_are_told_what_to_write(number):
    call, words = MISTAKES[number]
    with pytest.raises((ArgumentError, ConfigError), match=re.escape(words)):
        call()


def test_none_and_booleans_are_the_masks_they_mean():
    lower = np.tril(np.ones((6, 6), bool))
    forms = {name: attend(mask=mask) for name, mask in {"none": None, "causal": masks.Causal(), "lower": lower}.items()}
    np.testing.assert_array_equal(forms["none"], attend())
    for visible in (lower, jnp.asarray(lower), lower[None, None], nnx.Variable(jnp.asarray(lower))):
        np.testing.assert_allclose(attend(mask=visible), forms["causal"], atol=1e-6)
        np.testing.assert_allclose(kernelry.flax.AttentionOp()(Q, K, K, mask=visible), forms["causal"], atol=1e-6)
    assert Request(q_len=6, mask=None) == Request(q_len=6)
    assert Request(q_len=6, mask=lower) == Request(q_len=6, mask=masks.Dense(lower))


def test_variables_of_flax_are_the_arrays_inside():
    rng = np.random.default_rng(0)
    arrays = {
        "query": rng.standard_normal(Q.shape, np.float32),
        "key": rng.standard_normal(K.shape, np.float32),
        "value": rng.standard_normal(K.shape, np.float32),
        "bias": rng.standard_normal((6, 6), np.float32),
        "sinks": rng.standard_normal(4, np.float32),
    }
    ids, offset = jnp.arange(6) // 3, jnp.int32(1)

    def out(wrap):
        mask = masks.Segments(wrap(ids)) & masks.Causal().at(query_offset=wrap(offset))
        return kernelry.attention(**{name: wrap(jnp.asarray(array)) for name, array in arrays.items()}, mask=mask)

    out = jax.jit(out, static_argnums=0)
    np.testing.assert_array_equal(out(nnx.Param), out(jnp.asarray))


def test_a_variables_gradient_is_the_arrays():
    sinks = jnp.arange(4.0)
    through = jax.grad(lambda sinks: attend(sinks=nnx.Param(sinks)).sum())(sinks)
    np.testing.assert_array_equal(through, jax.grad(lambda sinks: attend(sinks=sinks).sum())(sinks))
    assert np.abs(through).min() > 0


def test_dtypes_are_named_as_jax_has_them():
    assert Request(q_len=8, dtype=jnp.bfloat16, logits_dtype=np.dtype("float32")) == Request(q_len=8, dtype="bfloat16")
    assert Request(q_len=8, dtype=np.float16) == Request(q_len=8, dtype="float16")


def test_a_mapping_that_holds_the_table_is_read():
    assert load_config({"attention": {"kernel": "blockwise"}, "model": 3}).kernel == "blockwise"
