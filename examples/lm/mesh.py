"""The model on a mesh: which part of the parameters and tokens a device has, and how attention is cut."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kernelry
from kernelry.errors import ConfigError, nearest
from kernelry.parallel import Sharding
from lm.settings import Settings

ROWS = Sharding(batch="data", heads="tensor", sequence="context")
"""Training, and prompts: rows, heads and tokens are cut."""

STEPS = Sharding(batch="data", heads="tensor", kv_sequence="context")
"""Decoding: a step has one query for each row, and the keys before it are cut."""


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How many devices share out rows, heads and tokens."""

    data: int = 1
    tensor: int = 1
    context: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads e.g. `data:2,context:4`.

        Raises:
          ConfigError: it has another form.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.partition(":")
            if axis not in known:
                raise ConfigError(f"mesh {text!r}: unknown axis {axis!r}{nearest(axis, known)}")
            if axis in sizes or not size.isdecimal() or int(size) < 1:
                raise ConfigError(f"mesh {text!r}: write each axis once with its size, e.g. data:2,context:4.")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def devices(self) -> int:
        """All of them."""
        return math.prod(dataclasses.astuple(self))

    def check(self, settings: Settings) -> None:
        """Checks that the sizes of a run divide.

        Raises:
          ConfigError: one does not, with the arithmetic.
        """
        training, model = settings.training, settings.model
        for axis, name, size in (
            ("data", "training.batch", training.batch),
            ("data", "training.evaluation_windows", training.evaluation_windows),
            ("context", "training.seq_len", training.seq_len),
            ("tensor", "model.heads", model.heads),
        ):
            parts = getattr(self, axis)
            if size % parts:
                raise ConfigError(f"{name}={size} does not divide over {axis}: {size} % {parts} = {size % parts}.")

    def make(self) -> Mesh:
        """Returns the mesh, with automatic axes: XLA partitions what is not attention.

        Raises:
          ConfigError: there are fewer devices, or some would be idle in a run of several processes.
        """
        found = len(jax.devices())
        if found < self.devices or (jax.process_count() > 1 and found > self.devices):
            sizes = ",".join(f"{name}:{size}" for name, size in dataclasses.asdict(self).items())
            raise ConfigError(f"mesh {sizes} has {self.devices} devices, and {found} are there.")
        sizes = dataclasses.asdict(self)
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def simulate_devices(count: int) -> None:
    """Gives the CPU as many devices. Only before JAX is first asked for devices."""
    jax.config.update("jax_num_cpu_devices", count)


@contextlib.contextmanager
def cut(sharding: Sharding) -> Iterator[None]:
    """Cuts the attention calls inside, where a mesh is active."""
    if jax.sharding.get_abstract_mesh().empty:
        yield
        return
    with kernelry.use(sharding=sharding):
        yield


def divisible(length: int) -> int:
    """Returns the next length that divides over the devices along `context`."""
    parts = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    return -(-length // parts) * parts


def rows_of_mesh() -> int:
    """Returns the devices along `data`; 1 without a mesh."""
    rows: int = jax.sharding.get_abstract_mesh().shape.get("data", 1)
    return rows


def shared_out(tokens: jax.Array) -> jax.Array:
    """Cuts tokens [B, T] over `data` and `context`, where a mesh is active."""
    if jax.sharding.get_abstract_mesh().empty:
        return tokens
    return jax.lax.with_sharding_constraint(tokens, PartitionSpec("data", "context"))


def written(cached: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes tokens [B, T, K, H] into slots start … start + T − 1 of [B, S, K, H].

    On a mesh the slots are cut over `context`, and each device writes its own: XLA would gather all of them to copy a
    slice.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.lax.dynamic_update_slice(cached, new, (0, start, 0, 0))
    token = jnp.arange(cached.shape[1]) - start
    is_new = (token >= 0) & (token < new.shape[1])
    moved = jnp.take(new, jnp.clip(token, 0, new.shape[1] - 1), axis=1)
    heads = "tensor" if cached.shape[2] % mesh.shape["tensor"] == 0 else None
    here = PartitionSpec("data", "context", heads)
    return jax.lax.with_sharding_constraint(jnp.where(is_new[None, :, None, None], moved, cached), here)


def placed(tree: Any, mesh: Mesh, spec: Callable[[Any, Any], PartitionSpec]) -> Any:
    """Puts arrays that every process has whole onto a mesh.

    Args:
      tree: the arrays.
      mesh: the mesh, of one process or more.
      spec: says how an array is cut, from its path in the tree and the array.
    """

    def put(path: Any, array: Any) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, spec(path, host)), lambda place: host[place]
        )

    return jax.tree_util.tree_map_with_path(put, tree)


_HEADS = {"query": -2, "key": -2, "value": -2, "out": -3, "gate": -1, "up": -1, "down": -2}
"""The dimension, from the right, of a layer's kernel that is cut over `tensor`: heads, or the hidden width."""


def of_parameter(mesh: Mesh) -> Callable[[Any, Any], PartitionSpec]:
    """Returns how each parameter is cut: by heads and the hidden width; what does not divide is on every device."""

    def spec(path: Any, array: Any) -> PartitionSpec:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        found = [_HEADS[name] for name in names if name in _HEADS and "kernel" in names]
        if not found or np.shape(array)[found[0]] % mesh.shape["tensor"]:
            return PartitionSpec()
        entries: list[str | None] = [None] * np.ndim(array)
        entries[found[0]] = "tensor"
        return PartitionSpec(*entries)

    return spec


def of_tokens(_: Any, array: Any) -> PartitionSpec:
    """How tokens are cut: [B, T] over `data` and `context`, [T] over `context`."""
    return PartitionSpec("data", "context") if np.ndim(array) == 2 else PartitionSpec("context")
