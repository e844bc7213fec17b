"""From times to preferences: the length from which another order serves better, and the order of kernels.

A row is a length in key tokens and the time of each kernel there; times of one row are compared with each other alone.
The regret of an order in a row is the time of its first kernel that has one, over the least time of the row.

Ties: kernels within three per cent of the quickest of them come in the order of preference, which needs the fewest
further packages. Lengths tie whose geometric mean of regrets is within half a per cent of the least, and then whose
worst regret is within three per cent of the least; the greatest of them is taken, so that the plain order serves as
long as it can.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

Row = tuple[int, dict[str, float]]
Order = tuple[str, ...]

TIE = 1.03
"""Of kernels in the geometric mean, and of lengths at worst."""
MEAN_TIE = 1.005
"""Of lengths in the geometric mean."""
EVERYWHERE = "dot_product"
"""Serves every call, so that what follows it in an order never does."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One order below a length, and another from there on; with the regrets that they leave."""

    least: int
    below: Order
    above: Order
    mean: float
    worst: float


def regret(order: Order, times: dict[str, float]) -> float:
    """Infinite where no kernel of the order has a time."""
    first = next((name for name in order if name in times), None)
    return math.inf if first is None else times[first] / min(times.values())


def mean(values: Iterable[float]) -> float:
    """The geometric mean; 1 of nothing."""
    return math.exp(statistics.fmean(map(math.log, found))) if (found := list(values)) else 1.0


def ranking(rows: Sequence[Row], preferred: Order) -> Order:
    """The kernels from the quickest on, each by the geometric mean over the rows that have its time."""
    names = {name for _, times in rows for name in times}
    scores = {name: mean(times[name] / min(times.values()) for _, times in rows if name in times) for name in names}
    order: list[str] = []
    while scores:
        quickest = min(scores.values())
        tied = sorted(name for name, score in scores.items() if score <= TIE * quickest)
        order.append(min(tied, key=lambda name: preferred.index(name) if name in preferred else len(preferred)))
        del scores[order[-1]]
    end = order.index(EVERYWHERE) + 1 if EVERYWHERE in order else len(order)
    return tuple(order[:end])


def crossing(rows: Sequence[Row], below: Order, above: Order) -> Split:
    """From which length on [above] serves better than [below]; at most one more than the greatest of the rows."""
    lengths = sorted({length for length, _ in rows})
    return _best([_split(rows, least, lambda _: below, lambda _: above) for least in (*lengths, lengths[-1] + 1)])


def measured_orders(rows: Sequence[Row], preferred: Order) -> Split:
    """The order that the times give, or two with a length between them where that serves better.

    With one order alone the split's length is 0.
    """

    def order(some: Sequence[Row]) -> Order:
        return ranking(some, preferred)

    lengths = sorted({length for length, _ in rows})
    one = _split(rows, 0, order, order)
    two = _best([one, *(_split(rows, least, order, order) for least in lengths[1:])])
    tied = one.mean <= MEAN_TIE * two.mean and one.worst <= TIE * two.worst
    return one if tied or two.below == two.above else two


def _split(
    rows: Sequence[Row], least: int, below: Callable[[Sequence[Row]], Order], above: Callable[[Sequence[Row]], Order]
) -> Split:
    short, long = [row for row in rows if row[0] < least], [row for row in rows if row[0] >= least]
    orders = below(short), above(long)
    lost = [regret(order, times) for order, some in zip(orders, (short, long), strict=True) for _, times in some]
    return Split(least, *orders, mean(lost), max(lost))


def _best(splits: Sequence[Split]) -> Split:
    least = min(split.mean for split in splits)
    tied = [split for split in splits if split.mean <= MEAN_TIE * least]
    worst = min(split.worst for split in tied)
    return max((split for split in tied if split.worst <= TIE * worst), key=lambda split: split.least)
