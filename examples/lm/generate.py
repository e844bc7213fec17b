"""Text from a trained model: prefill the prompt, then decode a byte at a time from caches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernelry import Mode
from lm.mesh import ROWS, STEPS, cut, divisible, rows_of_mesh
from lm.model import Cache, Decoder
from lm.settings import GenerationSettings

Caches = tuple[Cache, ...]


def prefill(model: Decoder, prompt: jax.Array, capacity: int) -> tuple[jax.Array, Caches]:
    """Reads a prompt [B, T]; returns the logits after it, [B, 256], and the caches."""
    rows, length = prompt.shape
    padding = divisible(length) - length  # of a prompt that is cut; causal: no token of it sees what follows
    prompt = jnp.pad(prompt, ((0, 0), (0, padding))) if padding else prompt
    with cut(ROWS):
        logits, caches = model(prompt, mode=Mode.PREFILL, caches=model.empty_caches(rows, divisible(capacity)))
    if padding:
        caches = tuple(dataclasses.replace(cache, length=jnp.int32(length)) for cache in caches)
    return logits[:, length - 1], caches


def decode(model: Decoder, token: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
    """Reads one more token per row, [B]; returns the logits after it and the caches."""
    with cut(STEPS):
        logits, caches = model(token[:, None], mode=Mode.DECODE, caches=caches)
    return logits[:, -1], caches


@functools.partial(nnx.jit, static_argnames=("length", "temperature"))
def generate(model: Decoder, prompt: jax.Array, key: jax.Array, *, length: int, temperature: float) -> jax.Array:
    """Continues prompts [B, T] by `length` bytes, [B, length]; temperature 0 is greedy."""
    return _continued(model, prompt, jax.random.split(key, length), temperature)[0]


@functools.partial(nnx.jit, static_argnames="length")
def greedy(model: Decoder, prompt: jax.Array, *, length: int) -> tuple[jax.Array, jax.Array]:
    """Continues prompts [B, T] by the likeliest bytes, [B, length]; and the logits they have, [B, length, 256]."""
    return _continued(model, prompt, jax.random.split(jax.random.key(0), length), 0.0)


def _continued(model: Decoder, prompt: jax.Array, keys: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    logits, caches = prefill(model, prompt, prompt.shape[1] + keys.shape[0])

    def step(carry: tuple[jax.Array, Caches], key: jax.Array) -> tuple[tuple[jax.Array, Caches], Any]:
        logits, caches = carry
        token = sample(logits, key, temperature)
        return decode(model, token, caches), (token, logits)

    _, (tokens, logits) = jax.lax.scan(step, (logits, caches), keys)
    return tokens.T, logits.swapaxes(0, 1)


def sample(logits: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
    """Draws a byte from softmax(logits / temperature); 0 takes the likeliest."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    return jax.random.categorical(key, logits / temperature)


def prompt_of(generation: GenerationSettings) -> jax.Array:
    """Returns the bytes of the prompt, [B, T]: one row, or on a mesh one for each device along `data`."""
    prompt = np.frombuffer(generation.prompt.encode(), np.uint8)
    return jnp.asarray(np.tile(prompt, (rows_of_mesh(), 1)), jnp.int32)


def continue_text(model: Decoder, generation: GenerationSettings, seed: int) -> list[str]:
    """Returns continuations of the prompt of a config, one for each row of `prompt_of`."""
    length, temperature = generation.length, generation.temperature
    tokens = generate(model, prompt_of(generation), jax.random.key(seed), length=length, temperature=temperature)
    return [bytes(row).decode(errors="replace") for row in np.asarray(tokens, np.uint8)]
