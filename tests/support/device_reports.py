"""A made-up report of benchmarks/device.py; no number in it was measured."""

from on_device.shapes import SHAPES


def timed(kind, milliseconds, *, wrong=False, of_copy=None, **facts):
    """What a report holds of a program that ran."""
    found = {"kind": kind, "median_ms": milliseconds, "wrong": wrong, "relative_error": {"out": 0.5 if wrong else 1e-3}}
    found |= {"of_matrix_product": 1 / (1 + milliseconds), "tflop_per_s": 1.0}
    return found | ({} if of_copy is None else {"of_copy": of_copy}) | facts


def kernel(name, milliseconds, **facts):
    return timed("kernel", milliseconds, kernel=name, adapters=[], **facts)


def absent(kind, reason):
    return {"kind": kind, "absent": "refused", "reason": reason}


def report(cells):
    """A report of `cells`: (shape, pass) -> programs by name."""
    shapes = {}
    for (shape, which), programs in cells.items():
        about = shapes.setdefault(shape, SHAPES[shape].to_json() | {"passes": {}})
        about["passes"][which] = {"programs": programs, "rulers": {}}
    versions = {"jax": "0.0.0", "kernelry": "0.0.0"}
    return {"device_kind": "made up", "date": "2000-01-01T00:00:00", "versions": versions, "shapes": shapes}
