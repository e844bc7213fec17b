"""Finding the fastest kernel and tiling of a call: by timing it on this device, or by a compiler's schedule without it.

Internal: the command `kernelry tune` is its front end. Imports everything but the command; what it finds is stored by
`kernelry.policy.store`, which calls read.
"""
