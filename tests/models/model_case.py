"""What a case of the model tests says."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
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
      products: whether calls are found by the products around their softmaxes.
      implementation: of attention in transformers; PyTorch's own is found with `products`.
      class_name: of the model, where transformers' AutoModel does not know it.
      building: a context in which the model is made.
      ignored: what transformers raises after the last layer.
      marked: flags [S] of the tokens that the kind's `bidirectional` names.
      bias: makes what is added to the logits of a call, as the remark of its kind says.
      layer_of: the layer of a config that the code's number means, where the two differ.
      name: what the tests call it; else all options.
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
    products: bool = False
    implementation: str = "eager"
    class_name: str = "AutoModel"
    building: Callable[[], Any] = contextlib.nullcontext
    ignored: tuple[type[Exception], ...] = ()
    marked: Any = None
    bias: Callable[[Any], Any] | None = None
    layer_of: Callable[[int], int] = int
    name: str = ""

    def __str__(self):
        return self.name or "-".join(
            [self.model_type, *(f"{name}={brief(value)}" for name, value in self.options.items())]
        )


def brief(value):
    """An option in the name of a case."""
    text = str(value).replace("_attention", "").replace(" ", "")
    return text if len(text) <= 40 else f"{text[:37]}..."
