"""Schedules of the passes of the splash kernels, one compilation each. Nothing is timed, nothing runs on a TPU.

libtpu writes its schedules where it is told before it is loaded, so `schedules` starts a process of its own, which is
this file: it compiles one pass after another.
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
from kernelry.aot.speed import Grid, tpu_speed
from kernelry.aot.tpu_schedule import read_schedule
from kernelry.masks import BlockKind
from kernelry.plugin import Inputs, Request, Tiling
from kernelry_tpu_splash.blocks import FORWARD, OF_KEYS, OF_QUERIES
from kernelry_tpu_splash.plugin import SPLASH, TOKAMAX_SPLASH

SPECS = {"splash": SPLASH, "tokamax_splash": TOKAMAX_SPLASH}
NAMES = {"forward": FORWARD, "dkv": OF_KEYS, "fused": OF_KEYS, "dq": OF_QUERIES}
"""Of the blocks of a pass; one that is over dQ has no block_kv_compute."""

HEADS, LENGTH = 64, 8192
"""As many that operands are in main memory: XLA puts small ones into vector memory, and kernels then copy nothing."""

MASK = masks.Causal()


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a kernel over causal attention.

    Args:
      kernel: `splash` or `tokamax_splash`.
      part: `forward`, `dkv`, `dq` or `fused`.
      kind: of TPU, e.g. `v5e`.
      dtype: of the operands.
      dims: of queries and keys, and of values.
      blocks: in the order of NAMES.
    """

    kernel: str
    part: str
    kind: str
    dtype: str
    dims: tuple[int, int]
    blocks: tuple[int, ...]

    @property
    def request(self):
        """What the kernel is asked."""
        facts = {"q_len": LENGTH, "q_heads": HEADS, "head_dim": self.dims[0], "value_dim": self.dims[1]}
        return Request(target=f"tpu:{self.kind}", dtype=self.dtype, mask=MASK, **facts)

    @property
    def tiling(self):
        """Its blocks; those of the other passes are small."""
        values = dict(SPECS[self.kernel].tilings(Request(q_len=512))[0].values)
        if self.kernel == "splash":
            values["backward_kernels"] = 1 if self.part == "fused" else 2
        return Tiling.of(**{**values, **dict(zip(NAMES[self.part], self.blocks, strict=True))})

    def program(self):
        """A function that is this pass alone, and its arguments."""
        request, tiling, body = self.request, self.tiling, SPECS[self.kernel].body()
        query, value = (jax.ShapeDtypeStruct((1, LENGTH, HEADS, dim), jnp.dtype(self.dtype)) for dim in self.dims)
        if self.part == "forward":

            def forward(*arrays):
                return body.forward(Inputs(*arrays, MASK.canonical()), request, tiling, statistics=False).out

            return forward, (query, query, value)

        def backward(query, key, value, *whole):
            found = body.backward(Inputs(query, key, value, MASK.canonical()), request, tiling, *whole, None)
            results = {"dkv": ("key", "value"), "dq": ("query",), "fused": ("query", "key", "value")}
            return [getattr(found, name) for name in results[self.part]]  # XLA removes the pass that is not asked for

        lse = jax.ShapeDtypeStruct((1, HEADS, LENGTH), jnp.float32)
        return backward, (query, query, value, value, lse, value)

    def seconds(self, schedule):
        """Predicted, of all heads."""
        kinds = MASK.block_map(LENGTH, LENGTH, *self.blocks[:2])
        turned = kinds.T if self.part in ("dkv", "fused") else kinds
        seen, cut = HEADS * int((kinds != BlockKind.EMPTY).sum()), HEADS * int((kinds == BlockKind.PARTIAL).sum())
        width = int((turned != BlockKind.EMPTY).sum(axis=1).max())
        steps = seen if self.kernel == "tokamax_splash" and self.part == "forward" else HEADS * len(turned) * width
        grid = Grid(steps, seen, HEADS * len(turned), cut)
        moved = seen * block_bytes(self)
        return tpu_speed(self.part, schedule, grid, moved, self.kind, compiler()).seconds


def default_passes(kernel, part, kind, dims, blocks=None):
    """What a forward or a backward pass in bfloat16 consists of, by default or with blocks of one size."""
    values = dict(SPECS[kernel].tilings(Pass(kernel, "forward", kind, "bfloat16", dims, ()).request)[0].values)
    if blocks is not None:
        values = {name: blocks if name.startswith("block") else value for name, value in values.items()}
    fused = values.get("backward_kernels") == 1 or "block_q_dq" not in values
    together = ("forward",) if part == "forward" else ("fused",) if fused else ("dkv", "dq")
    return [Pass(kernel, one, kind, "bfloat16", dims, tuple(values[name] for name in NAMES[one])) for one in together]


def block_bytes(step):
    """That a visible step fetches."""
    moving = step.blocks[0 if step.part in ("dkv", "fused") else 1]
    return moving * sum(step.dims) * jnp.dtype(step.dtype).itemsize


def compiler():
    """Its name and version."""
    import libtpu

    return f"libtpu {libtpu.__version__}"


def schedules(passes):
    """Compiles passes in a process of their own.

    Yields:
      Each pass, with its schedule or the reason why it does not compile; the last may be missing where the compiler
      ended the process.
    """
    passes = tuple(passes)
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=final.*"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        asked = json.dumps([dataclasses.asdict(one) for one in passes])
        command = [sys.executable, __file__, folder]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            process.stdin.write(asked)
            process.stdin.close()
            for one, line in zip(passes, process.stdout, strict=False):
                found = json.loads(line)
                bundles = found.get("bundles")
                yield one, found["reason"] if bundles is None else read_schedule(bundles)


def _compile(folder, asked):
    (kernel, part, kind), dims = (asked[name] for name in ("kernel", "part", "kind")), tuple(asked["dims"])
    one = Pass(kernel, part, kind, asked["dtype"], dims, tuple(asked["blocks"]))
    function, arguments = one.program()
    with contextlib.redirect_stdout(sys.stderr):
        found = aot.compile_for(f"tpu:{kind}", function, *arguments)
    if not found.ok:
        return {"reason": str(found.reason)}
    written = [path for path in folder.glob("*splash*-final_bundles.txt") if "schedule-analysis" not in path.name]
    [bundles] = written
    text = bundles.read_text()
    for path in folder.iterdir():
        path.unlink()
    return {"bundles": text}


if __name__ == "__main__":
    for asked in json.load(sys.stdin):
        sys.stdout.write(json.dumps(_compile(Path(sys.argv[1]), asked)) + "\n")
        sys.stdout.flush()
