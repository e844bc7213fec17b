"""ragged by the TPU compiler's own schedule, against the same request with one head after another. Nothing is timed."""

from pathlib import Path

import pytest
from static_speed import schedule_of

from kernelry.aot.speed import CLOCKS, CORES
from kernelry.resolution.published import DEVICE_RATES

pytestmark = pytest.mark.aot

PROGRAM = Path(__file__).with_name("decode_program.py")

APART = {
    ("v5e", "bfloat16"): 19408 + 241,
    ("v5p", "bfloat16"): 19418 + 328,
    ("v6e", "bfloat16"): 14263 + 260,
    ("tpu7x", "bfloat16"): 14177 + 221,
    ("v5e", "int8"): 18915 + 259,
    ("v5p", "int8"): 18794 + 327,
    ("v6e", "int8"): 14549 + 261,
    ("tpu7x", "int8"): 14694 + 236,
    ("v5e", "pages"): 10138 + 710,
    ("v5p", "pages"): 10073 + 847,
    ("v6e", "pages"): 7514 + 759,
    ("tpu7x", "pages"): 7468 + 702,
}
"""Cycles of a step, of the program below with jax 0.10.2 and libtpu 0.0.42.1 at 33cc357, which took every eighth
sublane for a head and cleaned the values of every block."""

SHARE = {"bfloat16": 1 / 5, "int8": 1 / 3, "pages": 1 / 3}

BLOCK_BYTES = 2 * 512 * 8 * 128 * 2
"""Of keys and values in bfloat16."""


@pytest.mark.parametrize(("kind", "held"), APART)
def test_a_block_of_joined_heads_takes_a_fraction_of_the_cycles_of_heads_apart(kind, held):
    found = schedule_of(PROGRAM, f"tpu:{kind}", held, kernel="kernelry_ragged")
    whole, part = (body.cycles + found.overhead + found.row for body in found.bodies)
    assert whole <= SHARE[held] * APART[kind, held], found
    assert part <= APART[kind, held], found
    if held == "bfloat16":
        assert whole <= _memory_cycles(kind), found


def _memory_cycles(kind):
    """In which a core's share of memory delivers a block."""
    return BLOCK_BYTES / (DEVICE_RATES[kind].bandwidth / CORES.get(kind, 1)) * CLOCKS[kind]
