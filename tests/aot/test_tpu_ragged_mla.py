"""Absorbed MLA decode through the TPU compiler: keys are read where they lie, once, as fast as memory delivers them.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins/test_ragged_mla.py. Cycles are those of
libtpu's final schedule, with the whole program in one step per block; nothing is timed.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from static_speed import compiled_by

import kernelry
from kernelry import masks
from kernelry.aot.speed import CLOCKS, CORES
from kernelry.plugin import PagedArray, QuantizedArray, ValueInKey
from kernelry.resolution.published import DEVICE_RATES

pytestmark = pytest.mark.aot

TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:tpu7x")
ROWS, SLOTS, PAGE = 4, 8192, 128
PROGRAM = Path(__file__).with_name("mla_program.py")


def keys_like(shape, dtype):
    if dtype != "int8":
        return jax.ShapeDtypeStruct(shape, dtype)
    return QuantizedArray(jax.ShapeDtypeStruct(shape, "int8"), jax.ShapeDtypeStruct((*shape[:3], 1), "bfloat16"))


def decoded(query, key, value, lengths, table):
    """One step; `value` is None where the keys begin with it."""
    if table is not None:
        key, value = PagedArray(key, table), value if value is None else PagedArray(value, table)
    placed = masks.Causal().at(query_offset=lengths - query.shape[1]) & masks.Lengths(lengths)
    options = {"mask": placed, "mode": "decode", "kernel": "ragged", "return_max_logits": True}
    return kernelry.attention(query, key, ValueInKey(512) if value is None else value, **options)


def arguments(heads, q_len, dtype, *, head_dim=576, paged=False, separate=False):
    slots = (ROWS * SLOTS // PAGE, PAGE) if paged else (ROWS, SLOTS)
    query = jax.ShapeDtypeStruct((ROWS, q_len, heads, head_dim), "bfloat16" if dtype == "int8" else dtype)
    value = keys_like((*slots, 1, 512), dtype) if separate else None
    table = jax.ShapeDtypeStruct((ROWS, SLOTS // PAGE), jnp.int32) if paged else None
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    return query, keys_like((*slots, 1, head_dim), dtype), value, lengths, table


def written(found):
    """The largest number of elements that an instruction besides the kernel writes to memory."""
    lines = (line.strip() for line in found.compiled.as_text().splitlines())
    named = (
        re.match(r"(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* (?:copy|transpose|fusion|pad|slice|concatenate)\(", line)
        for line in lines
    )
    return max(_product(match[1].split(",")) for match in named if match)


def _product(numbers):
    total = 1
    for number in numbers:
        total *= int(number)
    return total


CASES = {
    "deepseek": (128, 1, "bfloat16", {}),
    "as many rows as it takes": (128, 2, "bfloat16", {}),
    "a few heads": (16, 4, "bfloat16", {}),
    "float32": (16, 1, "float32", {}),
    "int8": (128, 1, "int8", {}),
    "pages": (128, 1, "bfloat16", {"paged": True}),
    "int8 in pages": (16, 2, "int8", {"paged": True}),
    "padded to registers": (128, 1, "bfloat16", {"head_dim": 640}),
    "values of their own": (128, 1, "bfloat16", {"separate": True}),
    "values of their own in pages": (16, 1, "bfloat16", {"separate": True, "paged": True}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_and_copies_no_keys(target, name, compile_for):
    heads, q_len, dtype, options = CASES[name]
    found = compile_for(target, decoded, arguments(heads, q_len, dtype, **options))
    assert found.ok, found.reason
    assert written(found) < ROWS * SLOTS * 64


def test_a_slice_of_the_keys_would_be_seen(compile_for):
    """So the test above could fail."""

    def sliced(query, key, value, lengths, table):
        return decoded(query, key, key[..., :512], lengths, table)

    found = compile_for("tpu:v6e", sliced, arguments(16, 1, "bfloat16"))
    assert found.ok, found.reason
    assert written(found) >= ROWS * SLOTS * 512


IN_MEMORY_TIME = [
    ("v5e", "array", 16),
    ("v6e", "array", 16),
    ("v6e", "array", 64),
    ("v6e", "array", 128),
    ("v6e", "int8", 16),
    ("v6e", "128", 16),
    ("v6e", "256", 128),
]
"""Chip; array, int8, or slots of a page; query heads."""


@pytest.mark.parametrize(("kind", "held", "heads"), IN_MEMORY_TIME)
def test_a_block_takes_at_most_1_2_of_the_cycles_in_which_memory_delivers_it(kind, held, heads):
    found, printed = compiled_by(PROGRAM, f"tpu:{kind}", held, str(heads), kernel="kernelry_ragged")
    size = int(printed.split()[-1]) * 576 * (1 if held == "int8" else 2)
    memory = size / (DEVICE_RATES[kind].bandwidth / CORES.get(kind, 1)) * CLOCKS[kind]
    assert found.overhead + found.row + max(found.body.cycles, found.body.mxu) <= 1.2 * memory, found
