"""What the compilers say of a GPU kernel: registers, spills, shared memory, and how its products are computed.

XLA writes the PTX of each kernel, and a list of the launches with their shared memory, into the folder that
`--xla_dump_to` names in XLA_FLAGS (jax 0.10; 0.12 writes the list alone). NVIDIA's assembler, `ptxas -v`, then says
what the machine code takes. Nothing here is measured: no kernel runs.

Source: PTX ISA 9.0, and ptxas of CUDA 12.9 to 13.5. `--xla_gpu_dump_llvmir=true` is not needed, and writes hundreds of
megabytes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from kernelry.aot.devices import GPUS, Gpu, NoCompilerError
from kernelry.errors import KernelryError

TENSOR_PATHS: dict[str, str] = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
"""Instructions of PTX that multiply matrices, the slowest first: of a warp, of a warp group on Hopper, of a Blackwell's
tensor memory."""

_REGISTERS = 65536
"""Of 32 bits, of a multiprocessor; the same from compute capability 8.0 to 10.0, as are the next four. Source: CUDA C++
Programming Guide, table of technical specifications."""

_REGISTER_UNIT = 256
"""Registers that a warp is given at once."""

_THREADS = 2048
_BLOCKS = 32
_WARP = 32

_RESERVED = 1024
"""Bytes of shared memory that CUDA keeps of each block of threads."""

_PACKAGES = ("nvidia.cu13", "nvidia.cuda_nvcc")
"""In which `nvidia-cuda-nvcc` puts ptxas, for CUDA 13 and 12; jax looks there first. nvdisasm has one of its own."""

_LAUNCH = re.compile(r"\]\s+(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+)")
"""A line of XLA's list of thunks."""


THUNKS = ".thunk_sequence.txt"
"""How the names of XLA's lists of thunks end."""


@final
class AssemblerError(KernelryError):
    """ptxas does not accept a PTX text; the message quotes what it says."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as XLA launches it.

    Args:
      kernel: its name.
      grid: programs along each axis.
      threads: of a program.
      shared_memory: bytes, which the launch asks for.
    """

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared_memory: int


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Ptx:
    """The PTX of one kernel.

    Args:
      kernel: the name of its entry.
      arch: what it is compiled for, e.g. `sm_90a`.
      threads: of a program; 0 where the text does not say.
      products: matrix instructions by path, see `TENSOR_PATHS`; none that is 0.
      text: all of it.
    """

    kernel: str
    arch: str
    threads: int
    products: tuple[tuple[str, int], ...]
    text: str = dataclasses.field(repr=False)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """A kernel of a program that XLA compiled.

    Args:
      program: the name of the program in the dumps, e.g. `module_0001.jit_step`.
      ptx: None where XLA wrote none; `unseen` says why.
    """

    program: str
    launch: Launch
    ptx: Ptx | None

    @property
    def unseen(self) -> str:
        """Why nothing is known of the machine code; empty where the PTX is there."""
        return (
            "" if self.ptx else f"no PTX of {self.launch.kernel} was written: XLA of jax 0.12 writes none of Triton's"
        )


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What `ptxas -v` says of one kernel.

    Args:
      registers: of a thread. spill_stores, spill_loads: bytes of a thread. shared_memory: static bytes.
      serialized: whether products of warp groups wait for one another, because there are too few registers.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    serialized: bool


@final
@dataclasses.dataclass(frozen=True, slots=True)
class GpuCode:
    """What the compilers say of a kernel's machine code; static, not measured.

    Args:
      registers: 32 bits each, of a thread.
      spill_stores, spill_loads: bytes that a thread writes to and reads from memory because it has too few registers.
      shared_memory: bytes of a block of threads.
      threads: of a block.
      blocks_per_sm: blocks that a multiprocessor holds at once.
      products: matrix instructions in the text by path, see `TENSOR_PATHS`.
      serialized: whether products of warp groups wait for one another, because there are too few registers.
      assembler: e.g. `ptxas 13.5.37`.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    threads: int
    blocks_per_sm: int
    products: tuple[tuple[str, int], ...]
    serialized: bool
    assembler: str

    @property
    def tensor(self) -> str:
        """The slowest path that a product takes: `mma.sync`, `wgmma` or `tcgen05`; empty without products."""
        return self.products[0][0] if self.products else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "products": dict(self.products), "tensor": self.tensor}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop of machine code.

    Args:
      instructions: all of it. spills: those of them that load or store what there was no register for.
    """

    instructions: int
    spills: int


def read_ptx(text: str) -> Ptx | None:
    """Reads the PTX of a kernel; None where the text has none, as XLA writes texts of constants alone."""
    entry, arch = re.search(r"\.entry\s+(\w+)", text), re.search(r"^\s*\.target\s+(\w+)", text, re.MULTILINE)
    if entry is None or arch is None:
        return None
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", text)
    counts = {path: len(re.findall(rf"\b{re.escape(name)}\b", text)) for path, name in TENSOR_PATHS.items()}
    return Ptx(
        entry[1],
        arch[1],
        math.prod(int(size) for size in threads.groups("1")) if threads else 0,
        tuple((path, count) for path, count in counts.items() if count),
        text,
    )


def read_launches(text: str) -> tuple[Launch, ...]:
    """Reads the launches in XLA's list of thunks, in their order."""
    found = []
    for line in text.splitlines():
        if match := _LAUNCH.search(line):
            grid, threads = (tuple(int(size) for size in sizes.split(",")) for sizes in (match[2], match[3]))
            found.append(Launch(match[1], grid, math.prod(threads), int(match[4])))
    return tuple(found)


def read_report(text: str, kernel: str) -> Report:
    """Reads what `ptxas -v` says of a kernel.

    Raises:
      AssemblerError: the text has no report of it.
    """
    own = re.search(
        rf"Compiling entry function '{re.escape(kernel)}'(.*?)(?=Compiling entry function|\Z)", text, re.DOTALL
    )
    registers = None if own is None else re.search(r"Used (\d+) registers", own[1])
    if own is None or registers is None:
        raise AssemblerError(f"ptxas was asked about {kernel!r} and says nothing of its registers: {_tail(text)}.")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", own[1])
    shared = re.search(r"(\d+) bytes smem", own[1])
    return Report(
        int(registers[1]),
        *((int(spills[1]), int(spills[2])) if spills else (0, 0)),
        int(shared[1]) if shared else 0,
        re.search(rf"serialized due to.*'{re.escape(kernel)}'", text) is not None,
    )


def blocks_per_sm(registers: int, threads: int, shared_memory: int, gpu: Gpu) -> int:
    """Returns how many blocks of threads a multiprocessor of a GPU holds at once; 0 where not even one fits.

    Args:
      registers: of a thread. threads: of a block. shared_memory: bytes of a block.
    """
    warps = -(-threads // _WARP)
    of_a_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // of_a_warp // warps
    return min(by_registers, _THREADS // (warps * _WARP), _BLOCKS, gpu.shared_memory // (shared_memory + _RESERVED))


def assemble(ptx: Ptx, kind: str, shared_memory: int = 0) -> GpuCode:
    """Returns what NVIDIA's assembler says of a kernel.

    Args:
      kind: of GPU, see `GPUS`; what it was compiled for.
      shared_memory: bytes that its launch asks for, see `read_launches`.

    Raises:
      NoCompilerError: ptxas is not installed.
      AssemblerError: ptxas does not accept the text.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = _run_assembler(ptx, Path(folder) / "kernel.cubin")
    report = read_report(said, ptx.kernel)
    shared = shared_memory + report.shared_memory
    return GpuCode(
        report.registers,
        report.spill_stores,
        report.spill_loads,
        shared,
        ptx.threads,
        blocks_per_sm(report.registers, ptx.threads, shared, GPUS[kind]),
        ptx.products,
        report.serialized,
        f"ptxas {tool_version(assembler()) or ''}".rstrip(),
    )


def kernels_in(folder: Path) -> Iterator[Listed]:
    """Yields the kernels of the programs of which XLA wrote dumps into a folder, in the order of their launches."""
    for listed in sorted(folder.glob(f"*{THUNKS}")):
        module = listed.name.removesuffix(THUNKS)
        texts = (read_ptx(path.read_text()) for path in folder.glob(f"{module}.*.ptx"))
        by_name = {ptx.kernel: ptx for ptx in texts if ptx is not None}
        for launch in read_launches(listed.read_text()):
            yield Listed(module, launch, by_name.get(launch.kernel))


def read_loops(assembly: str) -> tuple[Loop, ...]:
    """Reads machine code as `nvdisasm -c` prints it: its innermost loops, in the order of the program.

    A loop is what lies between a label and a branch back to it, both counted in.
    """
    labels: dict[str, int] = {}
    loops: set[tuple[int, int]] = set()
    lines: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\s*/\*[0-9a-f]+\*/\s", line):
            lines.append(line)
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if branch and branch[1] in labels and len(lines) - labels[branch[1]] > 1:
                loops.add((labels[branch[1]], len(lines)))
    inner = [
        (start, end)
        for start, end in sorted(loops)
        if not any(other != (start, end) and start <= other[0] and other[1] <= end for other in loops)
    ]
    return tuple(
        Loop(end - start, sum(re.search(r"\b(?:LDL|STL)\b", line) is not None for line in lines[start:end]))
        for start, end in inner
    )


def disassembled(ptx: Ptx) -> str:
    """Returns a kernel's machine code as `nvdisasm -c` prints it; `read_loops` reads it.

    Raises:
      NoCompilerError: ptxas or nvdisasm is not installed.
      AssemblerError: ptxas does not accept the text.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        _run_assembler(ptx, cubin)
        command: list[str | Path] = [tool("nvdisasm", "nvidia-cuda-nvdisasm"), "-c", cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assembler() -> Path:
    """Returns ptxas: that of the package `nvidia-cuda-nvcc`, where jax looks first, else that in PATH.

    Raises:
      NoCompilerError: there is none.
    """
    return tool("ptxas", "kernelry[aot-gpu]")


def tool(name: str, distribution: str) -> Path:
    """Returns a program of CUDA's toolkit: that of NVIDIA's packages, where jax looks first, else that in PATH.

    Args:
      name: e.g. `ptxas`.
      distribution: which brings it, for the error.

    Raises:
      NoCompilerError: there is none.
    """
    for package in _PACKAGES:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # no package of NVIDIA is installed at all
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / "bin" / name).is_file():
                return path
    if (found := shutil.which(name)) is not None:
        return Path(found)
    raise NoCompilerError(
        f"what a GPU kernel's machine code takes is said by CUDA's {name}, and none was found; "
        f"pip install '{distribution}', or put a CUDA toolkit's into PATH."
    )


@functools.lru_cache(maxsize=4)
def tool_version(path: Path) -> str | None:
    """Returns what a program of CUDA's toolkit says of its version, e.g. `13.5.37`; None where it says nothing."""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"\bV([\d.]+)", done.stdout)
    return version[1] if version else None


def _run_assembler(ptx: Ptx, cubin: Path) -> str:
    """Makes machine code of a kernel; returns what the assembler says."""
    source = cubin.with_suffix(".ptx")
    source.write_text(ptx.text)
    command: list[str | Path] = [assembler(), "-v", f"-arch={ptx.arch}", source, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssemblerError(f"ptxas does not accept the PTX of {ptx.kernel!r} for {ptx.arch}: {_tail(done.stderr)}.")
    return done.stdout + done.stderr


def _tail(text: str) -> str:
    return " ".join(text.split())[-300:]
