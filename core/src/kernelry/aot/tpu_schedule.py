"""The final schedule of one TPU kernel, read from what libtpu writes. Nothing is timed.

libtpu writes a `*-final_bundles.txt` and a `*-final_hlo-static-per-bundle-utilization.txt` for each Pallas call. A
bundle holds the instructions that start in one cycle, so that its address is a cycle:

    0x141   : > { %1059 = sbr.rel (%p8237_p10) target = $region52 }
    0x146   : > { %v1 = vld [vmem:[#allocation9_spill] sm:$0xff] } /* Start region 51 */
    0x5d0   : > { %1708 = vmatmul.bf16.gmra.mxu0 %v1 } /* End region 51 */
    0x5d1 PF: > { … } /* Start/End empty region 52 */

`LB` marks the first bundle of a loop, and a branch (`sbr.rel`) back to its region closes it: the loop over the grid.
Written for libtpu 0.0.42.1 … 0.0.50.1.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import final

from kernelry.errors import KernelryError


class ScheduleError(KernelryError, ValueError):
    """A text is not a schedule that can be read."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A stretch of bundles that runs as a whole.

    Args:
      cycles: one for each bundle.
      mxu: cycles for which the busiest matrix unit is occupied. The unit takes rows more slowly than bundles can send
        them, so that this may exceed `cycles`.
      spills: vector registers stored to memory for lack of registers, and loaded again.
      busiest: the slot of a bundle that is used most, e.g. `VALU`, and the share of it that is used; empty and 0 where
        the utilization is not known. Matrix units are not counted here.
    """

    cycles: int
    mxu: int
    spills: int
    busiest: tuple[str, float] = ("", 0.0)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """The schedule of one kernel, of one core.

    Args:
      bodies: the regions with a product, in the order of the program: what the steps run whose block is visible.
      overhead: cycles of every step of the grid, also of one that runs no body.
      row: cycles of what runs once for each row of the grid: other regions that a step may skip, e.g. clearing the
        accumulator before the first block and dividing by the sum after the last.
      bounds: of the grid of one core, 0 for a size that only the running program knows; empty where the kernel does
        not copy blocks. Two cores that share a device each have half of a dimension that is declared parallel.
      looped: whether a step is a turn of a loop, and not the whole program.
    """

    bodies: tuple[Region, ...]
    overhead: int
    row: int
    bounds: tuple[int, ...] = ()
    looped: bool = False

    @property
    def body(self) -> Region:
        """The body of most visible steps: the shortest, for the others also mask, or clear what the mask hides."""
        return min(self.bodies, key=lambda region: max(region.cycles, region.mxu))

    @property
    def spills(self) -> int:
        """Of all bodies."""
        return sum(region.spills for region in self.bodies)


def read_schedule(bundles: str, utilization: str | None = None) -> Schedule:
    """Reads the schedule of one kernel.

    A kernel whose grid has one step has no loop: all of it is the step. What a body with a product may skip inside
    itself is taken to be skipped, e.g. computing a block again after an overflow.

    Args:
      bundles: the content of a `*-final_bundles.txt`.
      utilization: the content of the `*-final_hlo-static-per-bundle-utilization.txt` of the same kernel.

    Raises:
      ScheduleError: there are no bundles, a loop has no end, no region has a product, a region
        with a product has a loop (how often it runs is not written down), or the two texts have different lengths.
    """
    program = _Program.of(bundles)
    step = program.step()
    skipped = [span for span in program.skipped() if step.encloses(span)]
    inside = program.parts_with_products(skipped)
    bodies = _outermost(span for span, parts in inside.items() if program.products_in(span, parts)) or [
        *_innermost(span for span in (*program.regions.values(), step) if program.products_in(span))
    ]
    if not bodies:
        raise ScheduleError("No region of these bundles has a vmatmul: a kernel without products cannot be predicted.")
    loops = [place for place in program.loops if place != step.start and any(span.holds(place) for span in bodies)]
    if loops:
        raise ScheduleError(f"The region with a product has a loop at {loops[0]:#x}, and its turns are not known.")
    once = _outermost(
        span
        for span in skipped
        if not program.products_in(span)
        and not program.transfers_in(span)
        and not any(body.encloses(span) for body in bodies)
    )
    row = sum(span.cycles for span in once)
    overhead = step.cycles - sum(span.cycles for span in bodies) - row
    slots = None if utilization is None else _Slots.of(utilization, program.length)
    found = tuple(program.region(span, slots, inside.get(span, ())) for span in bodies)
    return Schedule(found, overhead, row, _bounds(bundles), looped=step.cycles < program.length)


_BOUNDS = re.compile(r"^iteration_bounds: \(([\d, ]+)\)", re.MULTILINE)
_DYNAMIC = 2**31 - 1


def _bounds(text: str) -> tuple[int, ...]:
    """As the comments of copies have them."""
    found = _BOUNDS.search(text)
    sizes = [] if found is None else [int(size) for size in found[1].replace(",", " ").split()]
    return tuple(0 if size == _DYNAMIC else size for size in sizes)


@final
@dataclasses.dataclass(frozen=True, slots=True, order=True)
class _Span:
    """Bundles from an address to another, both included."""

    start: int
    end: int

    @property
    def cycles(self) -> int:
        return self.end - self.start + 1

    def holds(self, place: int) -> bool:
        return self.start <= place <= self.end

    def encloses(self, other: _Span) -> bool:
        return self.start <= other.start and other.end <= self.end


def _innermost(spans: Iterable[_Span]) -> list[_Span]:
    found = sorted(set(spans))
    return [span for span in found if not any(other != span and span.encloses(other) for other in found)]


def _outermost(spans: Iterable[_Span]) -> list[_Span]:
    found = sorted(set(spans))
    return [span for span in found if not any(other != span and other.encloses(span) for other in found)]


_ADDRESS = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?: ")
_PRODUCT = re.compile(r"= vmatmul\.(mubr\.)?(\w+)\.\S*?mxu(\d)")
_SPILL = re.compile(r"= v(?:ld|st) \[vmem:\[#allocation\d+_spill\]")
_BRANCH = re.compile(r"= sbr\.rel (?:\([^)]*\) )?target = \$region(\d+)")
_TRANSFER = re.compile(r"= dma\.")

_ROWS = {"f32": 8, "bf16": 16}
"""Of one product of one register [8, 128] of 32 bits; of 8 bits it has 32, at twice the rate of bfloat16."""


def _occupancy(dtype: str, wide: bool) -> int:
    """Cycles for which a product occupies its matrix unit.

    One row of 128 a cycle on v5e and v5p; on v6e and tpu7x, whose products name a register (`mubr`), two rows of 256.
    """
    rows = _ROWS.get(dtype, 16)
    return rows // 2 if wide else rows


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Program:
    """What the bundles of a kernel hold, by address.

    Args:
      length: bundles.
      loops: where loops begin.
      regions: by name.
      branches: where each stands, and the region that it goes to.
      products: where each stands, its matrix unit and the cycles for which it is occupied.
      spills: where each stands.
      transfers: where each stands: starting a copy, or waiting for one.
    """

    length: int
    loops: Sequence[int]
    regions: Mapping[str, _Span]
    branches: Sequence[tuple[int, str]]
    products: Sequence[tuple[int, str, int]]
    spills: Sequence[int]
    transfers: Sequence[int]

    @classmethod
    def of(cls, text: str) -> _Program:
        address, opened, regions = -1, dict[str, int](), dict[str, _Span]()
        loops, spills, transfers = list[int](), list[int](), list[int]()
        branches, products = list[tuple[int, str]](), list[tuple[int, str, int]]()
        for line in text.splitlines():
            if match := _ADDRESS.match(line):
                address = int(match[1], 16)
                loops += [address] * (match[2] == "LB")
            if address < 0:
                continue
            branches += [(address, name) for name in _BRANCH.findall(line)]
            products += [(address, unit, _occupancy(dtype, bool(wide))) for wide, dtype, unit in _PRODUCT.findall(line)]
            spills += [address] * len(_SPILL.findall(line))
            transfers += [address] * len(_TRANSFER.findall(line))
            opened |= dict.fromkeys(re.findall(r"Start(?:/End empty)? region (\d+)", line), address)
            ended = re.findall(r"(?:End|Start/End empty) region (\d+)", line)
            regions |= {name: _Span(opened[name], address) for name in ended if name in opened}
        if address < 0:
            raise ScheduleError("This text has no bundles: a line of them begins with an address, as `0x1f   : > {`.")
        return cls(address + 1, loops, regions, branches, products, spills, transfers)

    def step(self) -> _Span:
        """One turn of the first loop with a product, or where there is none, the whole program."""
        turns = (self.turn(start) for start in self.loops)
        return next((span for span in turns if self.products_in(span)), _Span(0, self.length - 1))

    def turn(self, start: int) -> _Span:
        """From where a loop begins to the end of the last branch back to it."""
        named = [name for name, span in self.regions.items() if span.start == start]
        back = [place for place, name in self.branches if name in named and place > start]
        if not back:
            raise ScheduleError(
                f"The loop that begins at {start:#x} has no branch back to it: the bundles are cut short."
            )
        # The bundles in a branch's delay slots run too; a region ends after them.
        return _Span(
            start, min((span.end for span in self.regions.values() if span.end > max(back)), default=max(back))
        )

    def skipped(self) -> Iterable[_Span]:
        """Regions that a branch may skip: each ends right before the region that the branch goes to."""
        for place, name in self.branches:
            target = self.regions.get(name)
            if target is not None and target.start > place:
                inside = [span for span in self.regions.values() if span.start > place and span.end == target.start - 1]
                yield min(inside, default=_Span(place + 1, target.start - 1))

    def products_in(self, span: _Span, parts: Sequence[_Span] = ()) -> bool:
        """Whether a span has a product outside of some parts of it."""
        places = (place for place, _, _ in self.products if span.holds(place))
        return any(not any(part.holds(place) for part in parts) for place in places)

    def parts_with_products(self, spans: Iterable[_Span]) -> Mapping[_Span, Sequence[_Span]]:
        """Of each span that has a product, the largest of the others within it that have one."""
        found = sorted({span for span in spans if self.products_in(span)})
        return {span: _outermost(other for other in found if other != span and span.encloses(other)) for span in found}

    def transfers_in(self, span: _Span) -> bool:
        return any(span.holds(place) for place in self.transfers)

    def region(self, span: _Span, slots: _Slots | None, parts: Sequence[_Span]) -> Region:
        """A span, without parts of it that a step skips."""

        def counts(place: int) -> bool:
            return span.holds(place) and not any(part.holds(place) for part in parts)

        occupied = collections.Counter[str]()
        for place, unit, cycles in self.products:
            if counts(place):
                occupied[unit] += cycles
        spills = sum(map(counts, self.spills))
        busiest = ("", 0.0) if slots is None else slots.busiest(span)
        return Region(
            span.cycles - sum(part.cycles for part in parts), max(occupied.values(), default=0), spills, busiest
        )


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Slots:
    """The slots of bundles: how many there are of each kind, and how many each bundle uses."""

    capacity: dict[str, int]
    used: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, text: str, bundles: int) -> _Slots:
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("==")]
        if len(lines) != bundles + 2:
            raise ScheduleError(
                f"The utilization is of {max(len(lines) - 2, 0)} bundles, and the schedule has {bundles}: pass the two "
                "files of one kernel."
            )
        rows = [tuple(int(number) for number in line.split()) for line in lines[1:]]
        return cls(dict(zip(lines[0].replace(",", " ").split(), rows[0], strict=True)), tuple(rows[1:]))

    def busiest(self, span: _Span) -> tuple[str, float]:
        sums = [sum(column) for column in zip(*self.used[span.start : span.end + 1], strict=True)]
        shares = {
            name: used / slots / span.cycles
            for (name, slots), used in zip(self.capacity.items(), sums, strict=True)
            if name != "MXU"
        }
        return max(shares.items(), key=lambda pair: pair[1])
