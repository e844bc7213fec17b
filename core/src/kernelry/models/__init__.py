"""Models: from a model's own config to the mask, scale, cap, sinks and heads of each of its layers.

`model` has the description, `reading` reads Hugging Face's config.json by the table of facts in `families`, `maxtext`
reads MaxText's files. Neither transformers, torch nor MaxText is imported.

The names below are public, its modules are internal. Imports `config` and what is below.
"""

from kernelry.models.maxtext import from_maxtext_model
from kernelry.models.model import LayerKind, Model, OtherLayers
from kernelry.models.reading import from_huggingface

__all__ = ["LayerKind", "Model", "OtherLayers", "from_huggingface", "from_maxtext_model"]
