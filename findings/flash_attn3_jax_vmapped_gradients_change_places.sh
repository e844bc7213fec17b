#!/usr/bin/env bash
# flash-attn3-jax has rules of its own for jax.vmap: the mapped axis is folded into the batch, and the kernel runs once. The
# forward rule unfolds what it folded. The backward rule folds with the mapped axis outside and unfolds with it inside: of 3
# mapped members with a batch of 2 each, 4 of the 6 gradients of the queries, the keys and the values arrive in the place of
# another sequence. Shapes are right and nothing is NaN. Whether jax.grad is inside jax.vmap or outside makes no difference. With
# one sequence in each member, or one member, both orders are the same, so a test of such a case passes.
# Seen with flash-attn3-jax 0.2.3 and jax 0.10.2 on CPU. The package's kernels need a Hopper GPU: its two primitives are lowered
# to plain JAX here, checked against jax.grad of plain attention, and its batching rules are as shipped. So an ensemble of
# models that is trained under vmap learns from the wrong sequences.
set -euo pipefail
for python in python3.12 python3.11 none; do
    "$python" -c "" 2>/dev/null && break
done
if [ "$python" = none ]; then
    echo "flash-attn3-jax 0.2.3 skipped: its wheels need python3.11 or python3.12"
    exit
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip "jax==0.10.2" "jaxlib==0.10.2" "einops==0.8.1"
pip --no-deps "flash-attn3-jax==0.2.3"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import flash_attn3_jax
import jax
import jax.numpy as jnp
import numpy as np
from flash_attn3_jax import flash, flash_mha
from jax.interpreters import mlir

LENGTH, HEADS, WIDTH = 8, 2, 16


def logits_of(q, k, softmax_scale):
    return softmax_scale * jnp.einsum("nthd,nshd->nhts", q, k, preferred_element_type=jnp.float32)


def forward(q, k, v, *, softmax_scale, is_causal, window_size):
    assert not is_causal and tuple(window_size) == (-1, -1)
    logits = logits_of(q, k, softmax_scale)
    out = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(logits), v.astype(jnp.float32))
    return out.astype(q.dtype), jax.nn.logsumexp(logits, axis=-1)


def backward(d_out, q, k, v, out, lse, *, softmax_scale, is_causal, window_size):
    assert not is_causal and tuple(window_size) == (-1, -1)
    d_out, q, k, v, out = (x.astype(jnp.float32) for x in (d_out, q, k, v, out))
    weights = jnp.exp(logits_of(q, k, softmax_scale) - lse[..., None])
    delta = jnp.einsum("nthd,nthd->nht", d_out, out)[..., None]
    d_logits = softmax_scale * weights * (jnp.einsum("nthd,nshd->nhts", d_out, v) - delta)
    found = (
        jnp.einsum("nhts,nshd->nthd", d_logits, k),
        jnp.einsum("nhts,nthd->nshd", d_logits, q),
        jnp.einsum("nhts,nthd->nshd", weights, d_out),
    )
    return tuple(x.astype(jnp.float16) for x in found)


mlir.register_lowering(flash._flash_mha_fwd_p, mlir.lower_fun(forward), platform="cpu")
mlir.register_lowering(flash._flash_mha_bwd_p, mlir.lower_fun(backward), platform="cpu")


def plain(q, k, v):
    return forward(q, k, v, softmax_scale=WIDTH**-0.5, is_causal=False, window_size=(-1, -1))[0]


def loss(attend):
    return lambda q, k, v, weight: (attend(q, k, v).astype(jnp.float32) * weight).sum()


def seen(members, batch):
    """How many sequences are off under vmap, by output and gradient, and whether the gradients are those of others."""
    rng = np.random.default_rng(0)
    shape = (members, batch, LENGTH, HEADS, WIDTH)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float16) for _ in range(4)]
    gradient = jax.grad(loss(flash_mha), argnums=(0, 1, 2))
    right = jax.grad(loss(plain), argnums=(0, 1, 2))
    one_by_one = [jnp.stack(x) for x in zip(*(gradient(*one) for one in zip(*arrays)))]
    wanted = [jnp.stack(x) for x in zip(*(right(*one) for one in zip(*arrays)))]
    for found, good in zip(one_by_one, wanted):
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(good, np.float32), atol=5e-3)
    outputs = jax.vmap(flash_mha)(*arrays[:3]), jnp.stack([flash_mha(*one) for one in zip(*arrays[:3])])
    mapped = jax.vmap(gradient)(*arrays)
    outside = jax.grad(loss(jax.vmap(flash_mha)), argnums=(0, 1, 2))(*arrays)
    assert all(bool((a == b).all()) for a, b in zip(mapped, outside))
    counts, places = {}, True
    for name, found, good in zip(("out", "dq", "dk", "dv"), (outputs[0], *mapped), (outputs[1], *one_by_one)):
        found, good = (np.asarray(x, np.float32).reshape(members * batch, -1) for x in (found, good))
        counts[name] = int((np.abs(found - good).max(axis=1) > 0.05).sum())
        if name != "out":  # the row of another: folded as member * batch + row, unfolded as row * members + member
            moved = good.reshape(batch, members, -1).swapaxes(0, 1).reshape(members * batch, -1)
            places &= bool(np.abs(found - moved).max() < 5e-3)
    return counts, places


for members, batch, expected in ((3, 1, 0), (1, 2, 0), (3, 2, 4), (2, 2, 2)):
    counts, places = seen(members, batch)
    text = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"vmap over {members}, batch of {batch}: sequences of {members * batch} that are off: {text}")
    assert counts == {"out": 0, **dict.fromkeys(("dq", "dk", "dv"), expected)}, counts
    assert places
print("flash-attn3-jax", flash_attn3_jax.__version__, "jax", jax.__version__)
PY
