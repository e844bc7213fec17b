"""Selections of cases: few in which every two values of two axes still meet, and a few of many."""

import itertools

import pytest


def covering(**axes):
    """Returns cases, a dict each, among which every pair of values of two axes occurs; the same ones each time.

    Greedy: a case begins with a pair that is missing, and each further axis takes the value that covers most of
    the missing pairs. Twelve cases cover six axes of two or three values.

    Args:
      axes: the values of each axis by name; the first value of an axis is preferred where all are alike.
    """
    names = list(axes)
    missing = {  # indices of values, for values need not be hashable
        ((one, a), (other, b))
        for one, other in itertools.combinations(names, 2)
        for a, b in itertools.product(range(len(axes[one])), range(len(axes[other])))
    }
    cases = []
    while missing:
        case = dict(min(missing, key=lambda pair: [(names.index(name), value) for name, value in pair]))
        for name in names:
            if name not in case:
                case[name] = max(range(len(axes[name])), key=lambda value: _met(case | {name: value}, names, missing))
        missing -= set(_pairs(case, names))
        cases.append({name: axes[name][case[name]] for name in names})
    return cases


def _pairs(case, names):
    """The pairs of a case that may be incomplete, in the order of the axes."""
    known = [(name, case[name]) for name in names if name in case]
    return itertools.combinations(known, 2)


def _met(case, names, missing):
    return sum(pair in missing for pair in _pairs(case, names))


def sweep_but(values, *kept):
    """Returns parameters of which `make test` runs the ones kept, and `make test-all` all."""
    assert set(kept) <= set(values)
    marked = (value if isinstance(value, tuple) else (value,) for value in values)
    return [
        pytest.param(*value, marks=() if value in kept or value[0] in kept else pytest.mark.sweep) for value in marked
    ]
