"""Hardware as a value: `platform[:kind[:topology]]`, e.g. `cpu`, `gpu:h100`, `tpu:v5e:2x2`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any, final

import jax

from kernelry import _compat
from kernelry.errors import ConfigError, nearest

PLATFORMS = ("cpu", "gpu", "tpu")
_PLATFORM_ALIASES = {"cuda": "gpu", "rocm": "gpu"}

# kind: (platform, generation, patterns of jax's device_kind). A generation is the CUDA compute
# capability times ten for GPUs and the TPU's version number for TPUs (NVIDIA's and Google
# Cloud's published tables). The first pattern that matches wins.
_KINDS: dict[str, tuple[str, int, str]] = {
    "v100": ("gpu", 70, r"\bv100\b"),
    "t4": ("gpu", 75, r"\bt4\b"),
    "a100": ("gpu", 80, r"\ba100\b"),
    "a10g": ("gpu", 86, r"\ba10g?\b"),
    "l4": ("gpu", 89, r"\bl4\b"),
    "l40s": ("gpu", 89, r"\bl40s?\b"),
    "h100": ("gpu", 90, r"\bh100\b"),
    "h200": ("gpu", 90, r"\bg?h200\b"),
    "b200": ("gpu", 100, r"\bg?b200\b"),
    "rtx5090": ("gpu", 120, r"\brtx ?5090\b(?!.*laptop)"),  # of another chip
    "rtxpro6000": ("gpu", 120, r"\brtx ?pro ?6000\b"),
    "v4": ("tpu", 4, r"tpu v4$"),
    "v5e": ("tpu", 5, r"tpu v5 ?(lite|e)"),
    "v5p": ("tpu", 5, r"tpu v5p?$"),
    "v6e": ("tpu", 6, r"tpu v6 ?(lite|e)"),
    "tpu7x": ("tpu", 7, r"tpu ?(v?7x?)"),
}
KINDS = tuple(_KINDS)
_VENDORS = {"nvidia": "gpu", "amd": "gpu"}


def platform_meant(name: str) -> str | None:
    """Returns the platform that a name means: another name of it, a kind of it, or a misspelling.

    None says that this may be a platform of its own, which a JAX plugin brings.
    """
    name = name.lower()
    meant = _PLATFORM_ALIASES.get(name) or _VENDORS.get(name) or (_KINDS[name][0] if name in _KINDS else None)
    close = difflib.get_close_matches(name.partition(":")[0], PLATFORMS, n=1)
    return meant or next(iter(close), None)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where a request will run.

    Args:
      platform: `cpu`, `gpu` or `tpu`, or another platform name that JAX knows.
      kind: the device kind, e.g. `h100` or `v5e`; None when unknown or immaterial.
      topology: the slice, e.g. `2x2`; None where it does not matter.
    """

    platform: str
    kind: str | None = None
    topology: str | None = None

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """Reads the grammar `platform[:kind[:topology]]`; a JAX device kind is an alias too.

        Raises:
          ConfigError: the platform or the kind is unknown.
        """
        if isinstance(text, Target):
            return text
        if not isinstance(text, str):
            raise ConfigError(f"a target is a name such as 'gpu:h100', got {text!r}.")
        if "," in text:
            raise ConfigError(f"target {text!r} must be one target; on the command line write --target for each.")
        name, _, rest = text.strip().partition(":")
        platform = _PLATFORM_ALIASES.get(name.lower(), name.lower())
        if platform not in PLATFORMS:
            of = next((platform for platform in PLATFORMS if _kind_of(platform, text.strip()) in _KINDS), None)
            hint = nearest(name, PLATFORMS) if of is None else f"; write '{of}:{text.strip()}'"
            raise ConfigError(f"target {text!r}: unknown platform {name!r}{hint}")
        kind, _, topology = rest.partition(":")
        if not kind:
            return cls(platform)
        known = _kind_of(platform, kind)
        if known is None:
            of_platform = [k for k, (p, _, _) in _KINDS.items() if p == platform]
            raise ConfigError(f"target {text!r}: unknown {platform} kind {kind!r}{nearest(kind, of_platform)}")
        return cls(platform, known, topology or None)

    @classmethod
    def of_device(cls, platform: str, device_kind: str) -> Target:
        """Names a device as JAX describes it; a kind that is not in the table keeps its own name."""
        name = _PLATFORM_ALIASES.get(platform, platform)
        if name == "cpu":
            return cls("cpu")
        slug = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
        return cls(name, _kind_of(name, device_kind) or slug or None)

    @property
    def generation(self) -> int | None:
        """Compute capability times ten (GPU) or version (TPU); None when the kind is unknown."""
        if self.kind is None or self.kind not in _KINDS:
            return None
        return _KINDS[self.kind][1]

    def __str__(self) -> str:
        return ":".join(part for part in (self.platform, self.kind, self.topology) if part)


def oldest(platform: str, generation: int | None) -> Target:
    """Returns the first kind of a platform that is of a generation or a later one; without one the platform alone."""
    if generation is None:
        return Target(platform)
    kinds = (kind for kind, (of, since, _) in _KINDS.items() if of == platform and since >= generation)
    return Target(platform, next(kinds, None))


def _kind_of(platform: str, text: str) -> str | None:
    lowered = text.lower()
    if lowered in _KINDS and _KINDS[lowered][0] == platform:
        return lowered
    for kind, (of_platform, _, pattern) in _KINDS.items():
        if of_platform == platform and re.search(pattern, lowered):
            return kind
    return None


def current_target() -> Target:
    """Returns where a computation traced here and now would run.

    The active abstract mesh's device, else `jax_default_device`, else the default backend.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else _compat.abstract_device(mesh)
    if device is not None:
        return Target.of_device(device.platform, device.device_kind)
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    if default is not None:
        return Target.of_device(default.platform, default.device_kind)
    return home_target()


def home_target() -> Target:
    """Returns the Target of this process's default backend."""
    first = jax.devices()[0]
    return Target.of_device(first.platform, first.device_kind)
