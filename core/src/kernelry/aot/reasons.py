"""What a vendor's compiler says when it refuses a program, in one line, with what to change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import final


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Reason:
    """Why a program does not compile.

    Args:
      text: the compiler's own words, on one line.
      remedy: what to change; empty where that is not known.
    """

    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text

    def about(self, kernel: str, tiling: Mapping[str, int]) -> Reason:
        """The same with a remedy in the words of the config: blocks half as large as those that were too large.

        Args:
          kernel: its name.
          tiling: the tunables it was compiled with.
        """
        blocks = [f"{name} = {size // 2}" for name, size in tiling.items() if name.startswith("block_") and size > 1]
        if self.remedy != _SMALLER or not blocks:
            return self
        return Reason(self.text, f"{_SMALLER}, e.g. [attention.tilings] {kernel} = {{ {', '.join(blocks)} }}")

    @classmethod
    def of_memory(cls, wanted: int, available: int) -> Reason:
        """Says that a program needs more bytes than the device has, where its compiler does not."""
        sizes = f"{wanted / _GIB:.1f} GiB for arguments, outputs and temporaries, of {available / _GIB:.1f} GiB"
        return cls(f"the program needs {sizes}", _LESS_MEMORY)

    @classmethod
    def of(cls, error: Exception) -> Reason:
        """Finds the line that says it, and what helps."""
        words = str(error)
        for pattern, remedy in _KNOWN:
            if found := re.search(pattern, words):
                return cls(_one_line(found.group(0)).rstrip("."), remedy)
        return cls(_one_line(_telling(words)) or type(error).__name__)


_SMALLER = "set smaller blocks"
_LESS_MEMORY = "shorten the sequence, shard it, or choose a kernel that keeps no T×S logits"
_KNOWN = (
    (r"Shared memory size limit exceeded: requested \d+, available:? \d+", _SMALLER),
    (r"Scoped allocation with size [^ ]+ and limit [^ ]+ exceeded scoped vmem limit by [\d.]+\w?", _SMALLER),
    (r"Ran out of memory in memory space vmem[^\n]*", _SMALLER),
    (r"Ran out of memory in memory space smem[^\n]*", "set larger blocks: the table of blocks fills the scalar memory"),
    (
        r"Ran out of memory (?:on HBM|in memory space hbm)[^\n]*",
        _LESS_MEMORY,
    ),
    (r"Invalid vector type for load", "the compiler has no such vectors: choose float32 or bfloat16"),
)


def _telling(words: str) -> str:
    """The first line that is not a heading."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")


def _one_line(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…"


_GIB = 2**30
_LONGEST = 240
"""Characters of a reason."""
