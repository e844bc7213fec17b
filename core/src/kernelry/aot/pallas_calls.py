"""The Pallas calls of a traced program: their grids, and what each copies between main memory and a core.

Only jaxprs are read, so that no kernel needs to be known by its name. A block is copied again when its index changes
from one step of the grid to the next: the last dimension of the grid that the index depends on says how often. An index
that is read from a table, as kernels do that skip blocks, stays the same for a skipped step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import jax

_TABLE = -1
"""What an index depends on besides dimensions of the grid: an array that is known before the kernel begins."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A block of an operand or a result that Pallas copies for steps of the grid.

    Args:
      size: bytes.
      shape: its lengths, 1 along a dimension that the kernel does not see.
      depends: for each dimension, the dimensions of the grid that its index depends on; -1 is a table.
    """

    size: int
    shape: tuple[int, ...]
    depends: tuple[frozenset[int], ...]

    def copies(self, grid: Sequence[int]) -> tuple[int, bool]:
        """How often it is copied, and whether a step that is skipped copies nothing."""
        used = frozenset[int]().union(*self.depends)
        last = max((axis for axis in used if axis >= 0 and grid[axis] > 1), default=-1)
        return math.prod(grid[: last + 1]), _TABLE in used

    def along(self, size: int) -> frozenset[int]:
        """The dimensions of the grid that choose among parts of so many elements."""
        found = (axes for length, axes in zip(self.shape, self.depends, strict=True) if length == size)
        return frozenset(axis for axes in found for axis in axes if axis >= 0)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PallasCall:
    """One Pallas call of a program.

    Args:
      name: as the compilers have it.
      grid: its dimensions; one that only the running program knows counts the blocks that there are at most.
      known: which dimensions the program itself knows.
      runs: how often the program calls it: in a loop as often as that turns.
      blocks: what is copied for steps.
      whole: bytes of the operands that are copied once, tables for instance.
      arrays: bytes of all operands and results.
    """

    name: str
    grid: tuple[int, ...]
    known: tuple[bool, ...]
    runs: int
    blocks: tuple[Block, ...]
    whole: int
    arrays: int

    @property
    def steps(self) -> int:
        """Of one run."""
        return math.prod(self.grid)

    @property
    def rows(self) -> int:
        """Steps without the last dimension, along which kernels accumulate."""
        return math.prod(self.grid[:-1])

    def bytes(self, visited: float) -> float:
        """Bytes between main memory and the cores, of one run.

        Args:
          visited: the share of the steps that are not skipped.
        """
        total = float(self.whole)
        for block in self.blocks:
            copies, skips = block.copies(self.grid)
            total += block.size * max(1.0, copies * visited if skips else copies)
        return total

    def along(self, size: int) -> frozenset[int]:
        """The dimensions of the grid that choose among blocks of so many elements."""
        return frozenset[int]().union(*(block.along(size) for block in self.blocks))


def pallas_calls(program: Any) -> tuple[PallasCall, ...]:
    """Finds the Pallas calls of a jaxpr and of all inside it, in the order in which they run.

    A call in a loop counts as often as the loop turns, where that is known (`scan`), else once. Of the branches of a
    condition those with the most steps count.

    Args:
      program: a Jaxpr or ClosedJaxpr, as `jax.jit(f).trace(...).jaxpr` is.
    """
    return tuple(_found(program, 1))


def _found(program: Any, runs: int) -> Iterator[PallasCall]:
    for equation in getattr(program, "jaxpr", program).eqns:
        if equation.primitive.name == "pallas_call":
            yield _read(equation, runs)
            continue
        turns = runs * int(equation.params["length"]) if equation.primitive.name == "scan" else runs
        parts = [list(_found(inside, turns)) for inside in _inside(equation.params)]
        if equation.primitive.name == "cond":
            parts = [max(parts, key=lambda calls: sum(call.steps for call in calls))]
        for part in parts:
            yield from part


def _inside(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(params, is_leaf=_is_program)
    return [leaf for leaf in leaves if _is_program(leaf)]


def _is_program(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _read(equation: Any, runs: int) -> PallasCall:
    mapping = equation.params["grid_mapping"]
    known = tuple(isinstance(size, int) for size in mapping.grid)
    read = [_block(described, len(known)) for described in mapping.block_mappings]
    bounds = [bound for _, bounds in read for bound in bounds]
    grid = tuple(
        size if isinstance(size, int) else min((most for axis, most in bounds if axis == place), default=1)
        for place, size in enumerate(mapping.grid)
    )
    operands = [_size(variable.aval) for variable in equation.invars]
    results = [_size(variable.aval) for variable in equation.outvars]
    tables = operands[: len(operands) - mapping.num_inputs]
    blocks = tuple(block for block, _ in read)
    return PallasCall(
        equation.params.get("name") or "", grid, known, runs, blocks, sum(tables), sum(operands) + sum(results)
    )


def _size(array: Any) -> int:
    size: int = math.prod(array.shape) * array.dtype.itemsize
    return size


def _block(described: Any, dimensions: int) -> tuple[Block, list[tuple[int, int]]]:
    """A block, and for dimensions of the grid the most steps that its index, or a table that it reads, allows."""
    array = described.array_aval
    shape = tuple(_length(size) for size in described.block_shape)
    indices, bounds = _dependencies(described.index_map_jaxpr.jaxpr, dimensions)
    for index, length, whole in zip(indices, shape, array.shape, strict=True):
        bounds += [(axis, -(-whole // length)) for axis in index.direct]
    size = math.prod(shape) * array.dtype.itemsize
    return Block(size, shape, tuple(index.all for index in indices)), bounds


def _length(size: Any) -> int:
    """The elements of a block along one dimension; one where the kernel does not see that dimension."""
    return size if isinstance(size, int) else int(getattr(size, "block_size", 1))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Uses:
    """What an index is computed from: dimensions of the grid, others by which tables are read, and tables."""

    direct: frozenset[int] = frozenset()
    by_table: frozenset[int] = frozenset()

    @property
    def all(self) -> frozenset[int]:
        return self.direct | self.by_table

    def __or__(self, other: _Uses) -> _Uses:
        return _Uses(self.direct | other.direct, self.by_table | other.by_table)


def _dependencies(index_map: Any, dimensions: int) -> tuple[list[_Uses], list[tuple[int, int]]]:
    """What each index depends on, and the lengths of tables along dimensions of the grid that index them."""
    known: dict[Any, _Uses] = {}
    for place, variable in enumerate(index_map.invars):
        known[variable] = _Uses(frozenset({place})) if place < dimensions else _Uses(by_table=frozenset({_TABLE}))

    def of(value: Any) -> _Uses:
        return _Uses() if hasattr(value, "val") else known.get(value, _Uses())  # literals cannot be hashed

    bounds: list[tuple[int, int]] = []
    for equation in index_map.eqns:
        found = functools.reduce(operator.or_, map(of, equation.invars), _Uses())
        if equation.primitive.name == "get":
            bounds += _bounds_of_table(equation, of)
            found = _Uses(by_table=found.all)
        known.update(dict.fromkeys(equation.outvars, found))
    return [of(value) for value in index_map.outvars], bounds


def _bounds_of_table(equation: Any, of: Callable[[Any], _Uses]) -> Iterator[tuple[int, int]]:
    table, *indices = equation.invars
    for indexer in jax.tree.unflatten(equation.params["tree"], indices):
        for length, index in zip(table.aval.shape, indexer.indices, strict=True):
            if not isinstance(index, int):
                yield from ((axis, length) for axis in of(index).direct)
