"""A real transformer_engine, from a folder, over a native module that is stood in: no CUDA, no driver, no 6 GB.

The folder is what `pip install --no-deps --target FOLDER transformer_engine==VERSION` makes. All Python in it is the
vendor's, unchanged.

    transformer_engine_stand_in.install(folder)     # once, before the first import of transformer_engine
    import transformer_engine.jax

The native module's answer about kernels is a test's to give, and what it was asked is recorded under the names of
2.20's FusedAttnParams, whichever version asks:

    with transformer_engine_stand_in.answering() as asked: ...                        # there is a kernel, the default
    with transformer_engine_stand_in.answering("head_dim is odd"): ...                # none, and why
    with transformer_engine_stand_in.answering(RuntimeError("no driver")): ...        # raised
    with transformer_engine_stand_in.answering(capability=100): ...                   # on a Blackwell
    asked[-1]["attn_mask_type"].name == "NVTE_CAUSAL_MASK"

JAX asks while it traces, and what is traced already is not asked about again. Nothing is registered with XLA, so a
program lowers for CUDA, and only that, until `transformer_engine_on_cpu.register()`.
"""

import contextlib
import dataclasses
import enum
import importlib.abc
import importlib.metadata
import json
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CUDNN_VERSION = 91900  # 9.19.0: new enough for all five versions, and for deterministic gradients on Blackwell
WORKSPACE = 1024  # bytes

_ENUMS = json.loads((Path(__file__).parent / "transformer_engine_enums.json").read_text())  # of 2.20.2's native module
_GONE = {"NVTE_Fused_Attn_Backend": {"NVTE_F16_max512_seqlen": 0}}  # what older versions name besides

_ASKED_BY_POSITION = (
    *("is_training", "qkv_dtype", "kv_dtype", "qkv_layout", "bias_type", "attn_mask_type", "softmax_type", "dropout"),
    *("num_attn_heads", "num_gqa_groups", "max_seqlen_q", "max_seqlen_kv", "head_dim_qk", "head_dim_v"),
    *("window_size_left", "window_size_right", "deterministic"),
)
"""Of get_fused_attn_backend until 2.14; 2.11 leaves the last out."""

_OF_PRODUCTS = frozenset(
    {
        *("get_cgemm_num_max_streams", "get_cublasLt_version", "get_cuda_version"),
        *("get_grouped_gemm_setup_workspace_size", "initialize_cgemm_communicator"),
        *("is_collective_gemm_with_cublasmp", "nvte_built_with_cublasmp"),
    }
)
"""What the vendor's Python imports by name, and attention never calls. A RuntimeError of cuBLAS is one it expects."""


class Native(types.ModuleType):
    """The stand-in of the module `transformer_engine_jax`."""

    def __init__(self) -> None:
        super().__init__("transformer_engine_jax", "Answers for a GPU that is not there.")
        self.refusal: str | Exception | None = None
        self.capability = 90
        self.asked: list[dict[str, Any]] = []
        for name, members in _ENUMS["enums"].items():
            made = enum.IntEnum(name, members | _GONE.get(name, {}), module=self.__name__)
            setattr(self, name, made)
            if name in _ENUMS["exported"]:
                vars(self).update(made.__members__)

    def get_fused_attn_backend(self, *arguments: Any) -> Any:
        """Answers as 2.20 does, (backend, message), if asked as 2.20 asks; with the backend alone otherwise."""
        self.asked.append(_named(arguments))
        if isinstance(self.refusal, Exception):
            raise self.refusal
        backends = self.NVTE_Fused_Attn_Backend
        backend = backends.NVTE_F16_arbitrary_seqlen if self.refusal is None else backends.NVTE_No_Backend
        return (backend, self.refusal or "") if len(arguments) == 1 else backend

    def get_fused_attn_fwd_workspace_sizes(self, *_arguments: Any) -> tuple[tuple[int], enum.IntEnum]:
        return (WORKSPACE,), self.DType.kByte

    get_fused_attn_bwd_workspace_sizes = get_fused_attn_fwd_workspace_sizes

    def get_device_compute_capability(self, _device: int) -> int:
        if isinstance(self.refusal, Exception):
            raise self.refusal
        return self.capability

    def get_cudnn_version(self) -> int:
        return CUDNN_VERSION

    def nvte_get_qkv_format(self, layout: enum.IntEnum) -> enum.IntEnum:
        formats = self.NVTE_QKV_Format
        return formats.NVTE_BSHD if layout.name.startswith("NVTE_BS") else formats.NVTE_THD

    def get_num_compute_streams(self) -> int:
        return 4  # asked at import, for products of matrices

    def registrations(self) -> dict[str, Any]:
        return {}

    def __getattr__(self, name: str) -> Any:
        if name not in _OF_PRODUCTS:
            raise AttributeError(f"the stand-in of transformer_engine_jax has no {name}")

        def refuse(*_arguments: Any) -> None:
            raise RuntimeError(f"transformer_engine_jax.{name} needs cuBLAS, which is not stood in")

        return refuse


def _named(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if len(arguments) == 1:
        return dataclasses.asdict(arguments[0])
    return dict(zip(_ASKED_BY_POSITION, arguments, strict=False))


class _WithoutItsLibrary(importlib.abc.MetaPathFinder):
    """Finds nothing; keeps `transformer_engine.jax`, about to be found by others, from opening a shared library."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None) -> None:
        if name == "transformer_engine.jax":
            sys.modules["transformer_engine.common"].load_framework_extension = lambda _framework: None  # type: ignore


def install(folder: str | os.PathLike[str]) -> Native:
    """Makes `import transformer_engine.jax` import the one in the folder; installing it again changes nothing."""
    folder = Path(folder).resolve()
    if not (folder / "transformer_engine").is_dir():
        raise FileNotFoundError(f"{folder} holds no transformer_engine; `make test-te` installs it")
    native = sys.modules.get("transformer_engine_jax")
    if native is None:
        os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no library of CUDA is opened
        native = sys.modules["transformer_engine_jax"] = Native()
        sys.meta_path.insert(0, _WithoutItsLibrary())
        sys.path.insert(0, str(folder))
    elif str(folder) not in sys.path:
        raise RuntimeError(f"another transformer_engine is installed in this process; {folder} needs one of its own")
    return native  # type: ignore[return-value]


def version() -> tuple[int, ...]:
    """The version of the transformer_engine that is installed, e.g. (2, 20, 2)."""
    return tuple(int(part) for part in importlib.metadata.version("transformer_engine").split(".")[:3])


@contextlib.contextmanager
def answering(refusal: str | Exception | None = None, *, capability: int = 90) -> Iterator[list[dict[str, Any]]]:
    """Sets the native module's answers; yields the list of what it is asked meanwhile."""
    native: Any = sys.modules["transformer_engine_jax"]
    before = native.refusal, native.capability, native.asked
    native.refusal, native.capability, native.asked = refusal, capability, []
    try:
        yield native.asked
    finally:
        native.refusal, native.capability, native.asked = before
