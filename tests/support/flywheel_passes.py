"""Schedules of flywheel's passes, one compilation each, and what they say of a head. Nothing is timed or run on a TPU.

A kernel of flywheel has no grid: it loops over heads, blocks of queries and blocks of keys itself. A turn of that loop
has a body for blocks that are visible as a whole and, behind it, one for those that the mask cuts; it runs one of them.

libtpu writes its schedules where it is told before it is loaded, so `compiled` starts a process of its own, which is
this file.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from kernelry import aot, masks
from kernelry.aot.speed import CLOCKS
from kernelry.aot.tpu_schedule import read_schedule
from kernelry.masks import BlockKind
from kernelry.plugin import Inputs, Request
from kernelry_tpu_flywheel.plugin import FLYWHEEL

HEADS, LENGTH = 8, 8192
MASK = masks.Causal()
_BLOCKS = {"forward": ("block_q", "block_kv"), "backward": ("block_q_bwd", "block_kv_bwd")}


@dataclasses.dataclass(frozen=True)
class Pass:
    """`forward` or `backward` of causal attention in bfloat16 over 8,192 tokens, on a kind of TPU."""

    part: str
    kind: str
    dims: tuple[int, int]

    @property
    def request(self):
        facts = {"q_len": LENGTH, "q_heads": HEADS, "head_dim": self.dims[0], "value_dim": self.dims[1]}
        return Request(target=f"tpu:{self.kind}", dtype="bfloat16", mask=MASK, **facts)

    def program(self):
        """A function that is this pass alone, and its arguments."""
        request, body = self.request, FLYWHEEL.body()
        tiling = FLYWHEEL.tilings(request)[0]
        query, value = (jax.ShapeDtypeStruct((1, LENGTH, HEADS, dim), jnp.bfloat16) for dim in self.dims)
        if self.part == "forward":

            def forward(*arrays):
                return body.forward(Inputs(*arrays, MASK.canonical()), request, tiling, statistics=False).out

            return forward, (query, query, value)

        def backward(query, key, value, *whole):
            found = body.backward(Inputs(query, key, value, MASK.canonical()), request, tiling, *whole, None)
            return found.query, found.key, found.value

        lse = jax.ShapeDtypeStruct((1, HEADS, LENGTH), jnp.float32)
        return backward, (query, query, value, value, lse, value)

    def microseconds(self, bundles):
        """Predicted, of one head."""
        tiling = FLYWHEEL.tilings(self.request)[0]
        kinds = MASK.block_map(LENGTH, LENGTH, *(tiling[name] for name in _BLOCKS[self.part]))
        schedule = read_schedule(bundles)
        cycles = 0
        for kind, body in zip((BlockKind.FULL, BlockKind.PARTIAL), schedule.bodies, strict=True):
            cycles += int((kinds == kind).sum()) * (max(body.cycles, body.mxu) + schedule.overhead)
        return (cycles + len(kinds) * schedule.row) / CLOCKS[self.kind] * 1e6


def compiled(passes):
    """Compiles passes in a process of their own.

    Yields:
      Each pass, with its bundles or the reason why it does not compile.
    """
    passes = tuple(passes)
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=final.*"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        asked = json.dumps([dataclasses.asdict(one) for one in passes])
        command = [sys.executable, __file__, folder]
        done = subprocess.run(command, env=environment, input=asked, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        assert len(lines) == len(passes), done.stderr[-2000:]
        for one, line in zip(passes, lines, strict=True):
            found = json.loads(line)
            yield one, found.get("bundles"), found.get("reason")


def _compile(folder, asked):
    one = Pass(asked["part"], asked["kind"], tuple(asked["dims"]))
    function, arguments = one.program()
    with contextlib.redirect_stdout(sys.stderr):
        found = aot.compile_for(f"tpu:{one.kind}", function, *arguments)
    if not found.ok:
        return {"reason": str(found.reason)}
    [bundles] = [path for path in folder.glob("*flash_attn*-final_bundles.txt") if "schedule-analysis" not in path.name]
    text = bundles.read_text()
    for path in folder.iterdir():
        path.unlink()
    return {"bundles": text}


if __name__ == "__main__":
    for asked in json.load(sys.stdin):
        sys.stdout.write(json.dumps(_compile(Path(sys.argv[1]), asked)) + "\n")
        sys.stdout.flush()
