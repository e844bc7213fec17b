"""What the devices of a call on a mesh do, as text and as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from kernelry.execution.plan import Plan
from kernelry.masks.form import PositionKind
from kernelry.request.axes import Axes
from kernelry.request.request import Request
from kernelry.request.sharding import Sharding
from kernelry.resolution.balance import Balance, balances
from kernelry.resolution.communication import PEAK_SHARE, Communication, Pass, communication_of
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.published import Link
from kernelry.resolution.shards import ShardedResolution, Shards


def told_shards(resolution: Resolution) -> Iterator[str]:
    """Says what each device is asked, and what the call sends, holds and computes, line by line.

    Args:
      resolution: of a call on a mesh, with its shards.
    """
    found = _shards_of(resolution)
    request, shards = resolution.request, found.shards
    yield f"on {shards.sharding.devices} devices: {', '.join(_cuts(shards.sharding))}"
    yield f"each device has {_arithmetic(request, shards)}"
    communication = communication_of(request, shards)
    if shards.table is not None:
        yield from _told_pairs(found, communication)
    if PositionKind.TRACED in request.mask.position_kinds:
        yield "positions are known at run time only, so no step is left out before; pass NumPy arrays"
    if all(each.plan is not None for each in found.resolutions):
        yield from _told_costs(communication)
        yield from _told_orders(request, shards)
    if len(found.resolutions) > 1:
        yield _asked_about(found, resolution)


def _told_orders(request: Request, shards: Shards) -> Iterator[str]:
    orders, block = balances(request, shards)
    if orders:
        yield f"a device's work in blocks of {block} slots, and the efficiency of its steps:"
        yield from (f"  {order}" for order in orders)


def _asked_about(found: ShardedResolution, resolution: Resolution) -> str:
    """Which pairs of shards the candidates answer about."""
    answers = [each.candidates for each in found.resolutions]
    place = next(i for i, own in enumerate(answers) if own == resolution.candidates[: len(own)])
    mask = found.resolutions[place].request.mask
    return f"the answers of the kernels are about {found.shards.pairs(place)} pairs, mask={mask}"


def _shards_of(resolution: Resolution) -> ShardedResolution:
    assert resolution.shards is not None
    return resolution.shards


def _cuts(sharding: Sharding) -> Iterator[str]:
    sizes = dict(sharding.sizes)

    def written(axes: Axes) -> str:
        return ",".join(f"{axis}:{sizes[axis]}" for axis in axes)

    for name in ("batch", "heads", "sequence"):
        if axes := getattr(sharding, name):
            yield f"{name} over {written(axes)}"
    if sharding.kv_axes != sharding.sequence:
        yield f"keys over {written(sharding.kv_axes)}" if sharding.kv_axes else "keys on every device"
    if sharding.sequence and sharding.kv_axes:
        by = f"by {sharding.strategy}" + (f" with ulysses over {written(sharding.ulysses)}" if sharding.ulysses else "")
        yield by if sharding.order == "contiguous" else f"{by}, {sharding.order}"


def _arithmetic(request: Request, shards: Shards) -> str:
    """The sizes of a device, e.g. `T=8192/8=1024`, or `K=4·2/8=1` where key/value heads are repeated."""
    own = shards.requests[0]
    sizes = (
        ("B", request.batch, own.batch),
        ("T", request.q_len, own.q_len),
        ("S", request.kv_len, own.kv_len),
        ("N", request.q_heads, own.q_heads),
    )
    repeats = shards.sharding.kv_repeats(request.q_heads, request.kv_heads)
    repeated = f"{request.kv_heads}·{repeats}" if repeats > 1 else str(request.kv_heads)
    told = [_divided(letter, str(whole), whole, part) for letter, whole, part in sizes]
    return " ".join([*told, _divided("K", repeated, request.kv_heads * repeats, own.kv_heads)])


def _divided(letter: str, shown: str, whole: int, part: int) -> str:
    return f"{letter}={shown}" if whole == part else f"{letter}={shown}/{whole // max(part, 1)}={part}"


def _told_pairs(found: ShardedResolution, communication: Communication) -> Iterator[str]:
    shards, table = found.shards, found.shards.table
    assert table is not None
    pairs = len(table.table) * len(table.table[0])
    steps = f", {communication.steps} of {len(table.table[0])} steps" if shards.sharding.sequence else ""
    yield f"{pairs} pairs of shards: {table.full} full, {table.partial} partial, {table.skipped} skipped{steps}"
    works = _works([each.plan for each in found.resolutions])
    alike = len(set(works)) == 1
    for place, (resolution, work) in enumerate(zip(found.resolutions, works, strict=True)):
        yield f"  {shards.pairs(place)} of mask={resolution.request.mask}" + ("" if alike else f" → {work}")
    if alike:
        yield f"  {'each ' if len(works) > 1 else ''}→ {works[0]}"


def _works(plans: list[Plan | None]) -> list[str]:
    """What runs, as words: equal for plans that do the same. Of tunables only those are named that differ."""
    tunables = [{} if plan is None else dict(plan.tiling.values) for plan in plans]
    kernels = [None if plan is None else plan.kernel.name for plan in plans]
    found = []
    for plan, own in zip(plans, tunables, strict=True):
        if plan is None:
            found.append("no kernel")
            continue
        others = [each for each, name in zip(tunables, kernels, strict=True) if name == plan.kernel.name]
        differ = [f"{name}={value}" for name, value in own.items() if any(each.get(name) != value for each in others)]
        through = "".join(f" through {step.adapter.name}" for step in plan.steps)
        found.append(plan.kernel.name + through + (f" with {', '.join(differ)}" if differ else ""))
    return found


def _told_costs(communication: Communication) -> Iterator[str]:
    for name, each in communication.passes.items():
        sends = f"sends {in_bytes(each.bytes)}" if each.bytes else "sends nothing"
        yield f"{name}: {sends}" + (f", holds {in_bytes(each.held)} more" if each.held else "")
        yield from (f"  {in_bytes(transfer.bytes)}: {transfer}" for transfer in each.transfers)
        for link in communication.links if each.bytes else ():
            yield f"  over {link.name}: {_timed(each, communication, link)}"
    sending = any(each.bytes for each in communication.passes.values())
    if sending and not communication.links:
        yield "no times: no rate of the links of this target is published"
    if sending and communication.links:
        yield from (f"assumed: {link}" for link in communication.links)
        if communication.flops is not None:
            peak = communication.flops / PEAK_SHARE / 1e12
            yield f"assumed: compute at {PEAK_SHARE:.0%} of the published {peak:g} TFLOP/s of bfloat16"


def _timed(each: Pass, communication: Communication, link: Link) -> str:
    sending = in_time(each.bytes / link.bandwidth)
    if not any(transfer.hides for transfer in each.transfers):
        return f"{sending}, before or after the kernels"
    if communication.flops is None:
        return f"{sending}, mostly during compute, of which no rate is published for this dtype"
    times = each.times(link, communication.flops)
    hidden = "hidden" if not times.not_hidden else f"{in_time(times.not_hidden)} of it not hidden"
    return f"{sending}, {hidden} by {in_time(times.compute)} of compute"


def in_bytes(size: float) -> str:
    """E.g. `4.03 GB`, of 10⁹ bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:g} B"


def in_time(seconds: float) -> str:
    """E.g. `12.5 ms`."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def data_of_shards(resolution: Resolution) -> dict[str, Any]:
    """The same as plain data, described in docs/explanations.md."""
    found = _shards_of(resolution)
    request, shards, table = resolution.request, found.shards, found.shards.table
    communication = communication_of(request, shards)
    orders, block = balances(request, shards)
    pairs = None if table is None else {name: getattr(table, name) for name in ("full", "partial", "skipped")}
    classes = [
        {
            "pairs": shards.pairs(place),
            "request": each.request.to_json(),
            "plan": None if each.plan is None else each.plan.to_json(),
        }
        for place, each in enumerate(found.resolutions)
    ]
    return {
        "sharding": shards.sharding.to_json(),
        "devices": shards.sharding.devices,
        "pairs": pairs,
        "steps": communication.steps,
        "classes": classes,
        "forward": _pass_json(communication.forward, communication),
        "backward": None if communication.backward is None else _pass_json(communication.backward, communication),
        "links": [dataclasses.asdict(link) for link in communication.links],
        "flops": communication.flops,
        "orders": [_order_json(order, block) for order in orders],
    }


def _pass_json(each: Pass, communication: Communication) -> dict[str, Any]:
    times = (
        [] if communication.flops is None else [each.times(link, communication.flops) for link in communication.links]
    )
    return {
        "bytes": each.bytes,
        "held": each.held,
        "transfers": [dataclasses.asdict(transfer) for transfer in each.transfers],
        "step_flops": list(each.step_flops),
        "step_bytes": list(each.step_bytes),
        "seconds": [dataclasses.asdict(time) for time in times],
    }


def _order_json(order: Balance, block: int) -> dict[str, Any]:
    return {**dataclasses.asdict(order), "block": block}
