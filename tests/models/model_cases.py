"""The model types whose layers are reproduced, with the options that are varied."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model.

    Args:
      model_type: of transformers.
      options: of its config, over the tiny sizes.
      tolerance: of outputs.
      gain: the factor on the weights that make queries and keys.
      inputs: makes the model's inputs from token ids.
      stack_of: the stack that a call belongs to, in a model that has several.
      calls_per_layer: of attention.
      in_order: whether layers are counted, where the code numbers them otherwise.
    """

    model_type: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = 5e-6
    gain: float = 12.0
    dtype: str = "float32"
    inputs: Callable[[Any], dict[str, Any]] | None = None
    stack_of: Callable[[Any], str] | None = None
    calls_per_layer: int = 1
    in_order: bool = False

    def __str__(self):
        return "-".join([self.model_type, *(f"{name}={value}" for name, value in self.options.items())])


DECODERS = [
    Case("llama"),
    Case("mistral"),
    Case("mistral", {"sliding_window": None}),
    Case("mistral", {"is_causal": False}),
    Case("qwen2"),
    Case("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("gemma2"),
    Case("gpt_oss"),
]
CASES = [*DECODERS]
SPLASH = [case for case in CASES if case.model_type in ("gemma2",)]
