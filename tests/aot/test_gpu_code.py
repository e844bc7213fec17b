"""Registers, spills and instructions of `pallas_flash` and `pallas_decode`, by NVIDIA's assembler; nothing is timed."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kernelry.aot import gpu_code

pytestmark = pytest.mark.aot

PROGRAM = Path(__file__).with_name("gpu_program.py")
KINDS = ("a100", "h100", "b200")
DIMS = ("64", "80", "128", "192/128", "256")
NO_SPILL = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"
FLOAT32_SPILLS = {
    ("flash_80_80", "pallas_flash_backward_q"): 32,
    ("flash_80_80", "pallas_flash_backward_kv"): 32,
    ("flash_128_128", "pallas_flash_backward_q"): 32,
    ("flash_128_128", "pallas_flash_backward_kv"): 32,
    ("flash_192_128", "pallas_flash_backward_q"): 64,
    ("flash_192_128", "pallas_flash_backward_kv"): 320,
    ("flash_256_256", "pallas_flash_forward"): 64,
    ("flash_256_256", "pallas_flash_backward_q"): 160,
    ("flash_256_256", "pallas_flash_backward_kv"): 448,
    ("decode_256_256", "pallas_decode"): 64,
}
"""Bytes that a thread stores or loads at most, of the float32 kernels that spill: what ptxas 13.5 says of the GPU that
spills most, rounded up to a multiple of 32."""


def compiled(kind, dtype, *programs, flags=""):
    """Kernels of programs, with their code, by (head dims, kernel)."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_pass_re=NONE {flags}",
        }
        command = [sys.executable, str(PROGRAM), f"gpu:{kind}", dtype, *programs]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]
        return {
            (listed.program.partition("jit_")[2], listed.launch.kernel): (
                listed.ptx,
                gpu_code.assemble(listed.ptx, kind, listed.launch.shared_memory),
            )
            for listed in gpu_code.kernels_in(Path(folder))
            if listed.launch.kernel.startswith("pallas_")
        }


def programs(*names):
    return [f"{name}:{dims}" for name in names for dims in DIMS]


def spills(found):
    most = {at: max(code.spill_stores, code.spill_loads) for at, (_, code) in found.items()}
    return {at: size for at, size in most.items() if size}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_default_tiling_spills_a_register(kind, dtype):
    apart = [f"flash:{dims}" for at, dims in (("h100", "256"),) if at == kind]
    wanted = [program for program in programs("flash", "decode") if program not in apart]
    found = compiled(kind, dtype, *wanted, flags=NO_SPILL)
    assert spills(found) == {}
    if kind != "a100":
        paths = {at: code.tensor for at, (_, code) in found.items() if at[1] != "pallas_decode"}
        assert set(paths.values()) == {"wgmma" if kind == "h100" else "tcgen05"}, paths


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_widest_keys_of_hopper_spill_outside_of_the_inner_loops(dtype):
    """dK and dV of 256 columns each take half of all registers; block_kv_dkv=32 would leave wgmma."""
    found = compiled("h100", dtype, "flash:256")
    kernel = ("flash_256_256", "pallas_flash_backward_kv")
    assert spills(found).keys() <= {kernel}
    assert max(spills(found).values(), default=0) <= 96
    assert {code.tensor for _, code in found.values()} == {"wgmma"}
    assert [loop.spills for loop in gpu_code.read_loops(gpu_code.disassembled(found[kernel][0]))] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_values_in_keys_spill_no_register_and_a_step_reads_a_block_of_keys_once(kind, dtype):
    """The three copies are those before the loop, of two stages of the pipeline, and the one in it."""
    wanted = [f"{name}:576/512/{heads}" for name in ("mla", "mla_pages") for heads in (16, 32, 128)]
    found = compiled(kind, dtype, *wanted, flags=NO_SPILL)
    assert len(found) == len(wanted)
    assert spills(found) == {}
    for heads, path in ((16, "mma.sync"), (128, {"a100": "mma.sync", "h100": "wgmma", "b200": "tcgen05"}[kind])):
        if dtype != "int8":  # of which a program has 32 rows but on Blackwell
            assert {found[f"{name}_576_512_{heads}", "pallas_decode"][1].tensor for name in ("mla", "mla_pages")} == {
                path
            }
    if dtype != "int8" and kind != "b200":  # whose compiler writes more copies before the loop
        ptx, code = found["mla_576_512_128", "pallas_decode"]
        copies = re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10\b", ptx.text)
        assert len(copies) * 16 * code.threads == 3 * 32 * 576 * 2


@pytest.mark.parametrize("kind", KINDS)
def test_spills_of_float32_are_few_and_listed(kind):
    assert max(FLOAT32_SPILLS.values()) <= 512
    found = compiled(kind, "float32", *programs("flash", "decode"))
    assert len(found) == len(DIMS) * 4
    assert {at: size for at, size in spills(found).items() if size > FLOAT32_SPILLS.get(at, 0)} == {}


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("h100", {"pallas_flash_forward": 400, "pallas_flash_backward_kv": 320}),
        ("a100", {"pallas_flash_backward_kv": 500}),
    ],
)
def test_a_full_block_takes_few_instructions(kind, most):
    """The first innermost loop is that over full blocks, the second evaluates the mask."""
    found = compiled(kind, "bfloat16", "flash:128")
    for kernel, instructions in most.items():
        ptx, _ = found["flash_128_128", kernel]
        full, partial = gpu_code.read_loops(gpu_code.disassembled(ptx))
        assert full.instructions <= instructions, (kernel, full)
        assert full.instructions < partial.instructions
        assert full.spills == partial.spills == 0
