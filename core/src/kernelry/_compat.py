"""Differences between the versions of JAX that kernelry supports (0.10 … 0.12)."""

from __future__ import annotations

from typing import Any

import jax


def abstract_device() -> Any | None:
    """Returns the device description of the active mesh, or None where no mesh is active.

    A concrete mesh made current by `jax.set_mesh` and an abstract one made current by
    `jax.sharding.use_abstract_mesh` both show here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # AbstractMesh.abstract_device is public from 0.12; 0.10 has it undocumented (drop with 0.11).
    return None if mesh.empty else getattr(mesh, "abstract_device", None)
