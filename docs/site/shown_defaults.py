"""What signatures of the reference show where the source names a constant: `mask=Full()` for `mask=_FULL`."""

from __future__ import annotations

import importlib
import re
from typing import Any

import griffe

_CONSTANT = re.compile(r"_?[A-Z][A-Z_]+")
_LONGEST = 40
"""Characters; of a longer value the name says more."""


class ShownDefaults(griffe.Extension):
    """Replaces the name of a constant in a signature by its value."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Looks at one function when it is loaded."""
        for parameter in func.parameters:
            if parameter.default is not None and _CONSTANT.fullmatch(str(parameter.default)):
                value = repr(getattr(importlib.import_module(func.module.path), str(parameter.default)))
                if len(value) <= _LONGEST:
                    parameter.default = value
