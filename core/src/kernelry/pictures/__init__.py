"""Pictures of masks: as text, and with the extra `plot` as figures of matplotlib.

    print(kernelry.pictures.text(masks.Causal() & masks.Segments([0, 0, 0, 1, 1, 1])))
    kernelry.pictures.image(masks.Causal() & masks.SlidingWindow(127), 1024).savefig("mask.png")

The names below are public, its modules are internal. Imports `masks` and what is below.
"""

from kernelry.pictures.grid import text
from kernelry.pictures.plot import image

__all__ = ["image", "text"]
