"""Tiny random models of transformers, and every call of eager attention in them.

Imported by tests that run with `make test-models`; torch and transformers are imported when a function is called.
"""

import contextlib
import copy
import dataclasses
import json
import sys
from typing import Any

import numpy as np

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 2,
    "num_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}
"""Sizes that every config gets which has such a key; a case overrides them."""

WINDOWS = ("sliding_window", "attention_window_size")
LENGTH = 40
"""Tokens of a sequence: several windows and chunks."""


@dataclasses.dataclass
class Call:
    """One call of eager attention: arrays [B, T, N, H] and [B, S, K, H] as NumPy's, and what was passed with them."""

    layer: int
    module: str
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray
    mask: Any
    scale: float | None
    rotated: bool
    more: dict[str, Any]

    @property
    def visible(self):
        """Booleans [T, S] of the first sequence and head: what transformers' mask lets through."""
        if self.mask is None:
            return np.ones((self.query.shape[1], self.key.shape[1]), bool)
        mask = np.broadcast_to(self.mask[0, 0], (self.query.shape[1], self.key.shape[1]))
        return mask if mask.dtype == bool else mask > -1e4


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""Sizes of the other parts of a multimodal model, which do not run here."""


def tiny_options(model_type, options):
    """The content of a config.json with small sizes, also of its parts, and windows of 7 where a model type has one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    found = getattr(config_class, "sub_configs_defaults", {})
    parts = {}
    for name, part in found.items() if "text_config" in found else ():
        given = options.get(name, {})
        inner = given.get("model_type", part.model_type)
        part_class = part if isinstance(part, type) else CONFIG_MAPPING[inner]
        sizes = {**TINY, **dict.fromkeys(WINDOWS, 7)} if name == "text_config" else VISION
        sizes = {} if name == "codec_config" else sizes  # convolutions, whose sizes depend on each other
        parts[name] = {"model_type": inner, **sized(part_class, sizes, given)}
    sizes = {**TINY, **dict.fromkeys(WINDOWS, 7)}
    return {"model_type": model_type, **sized(config_class, sizes, options), **parts}


def sized(config_class, sizes, options):
    """The sizes that a class of configs has a key for, and options under either name of a key."""
    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    own = {config_class.attribute_map.get(name, name) for name in options}
    given = {
        name: value
        for name, value in sizes.items()
        if name in names and config_class.attribute_map.get(name, name) not in own
    }
    return {**given, **options}


def tiny_config(options):
    """The config of transformers for such a content."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[options["model_type"]].from_dict(copy.deepcopy(options))


def content_of(config):
    """What `save_pretrained` would write as config.json, read again."""
    return json.loads(config.to_json_string(use_diff=True))


def tiny_model(config, *, seed=0, gain=12.0, dtype="float32", implementation="eager", class_name="AutoModel"):
    """A random model; the weights that make queries and keys are scaled up."""
    import torch
    import transformers

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    config.use_cache = False
    model_class = getattr(transformers, class_name)
    make = getattr(model_class, "from_config", None) or model_class._from_config
    model = make(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            parts = name.split(".")
            if weight.ndim == 2 and any(part in QUERY_AND_KEY for part in parts):
                weight.mul_(gain)
            elif "sinks" in name:
                weight.normal_()
    return model if dtype == "float32" else model.to(getattr(torch, dtype))


QUERY_AND_KEY = (
    "q_proj",
    "k_proj",
    "query",
    "key",
    "q_b_proj",
    "kv_b_proj",
    "q_lin",
    "k_lin",
    "q",
    "k",
    "Wqkv",
    "qkv_proj",
    "c_attn",
    "query_key_value",
)


def capture(model, *, products=False, ignored=(), **inputs):
    """Runs a model and returns its calls of eager attention, in order.

    Args:
      products: whether the calls are found by the products around their softmaxes; see `products`.
      ignored: exceptions that are raised after the last layer.
    """
    import torch
    from products import recording_products

    calls: list[Call] = []
    rotations = [0]
    with contextlib.ExitStack() as stack, torch.no_grad():
        if model.dtype == torch.float64:
            _replace(stack, torch.nn.functional, "softmax", _softmax_in_own_dtype)
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("transformers.models.") and ".modeling_" in module.__name__:
                _wrap(stack, module, calls, rotations)
        if products:
            stack.enter_context(recording_products(calls, rotations))
        with contextlib.suppress(*ignored):
            model(**inputs)
    return calls


def _wrap(stack, module, calls, rotations):
    attend = getattr(module, "eager_attention_forward", None)
    if attend is not None:
        _replace(stack, module, "eager_attention_forward", _recording(attend, calls, rotations))
    for name in vars(module).copy():
        if name.startswith(("apply_rotary", "apply_multimodal_rotary", "apply_rotary_emb")):
            _replace(stack, module, name, _counting(getattr(module, name), rotations))


def _replace(stack, module, name, instead):
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, instead)


def _softmax_in_own_dtype(logits, dim, dtype=None):
    """Eager attention takes it in float32, whatever the dtype of the model."""
    return logits.softmax(dim)


def _counting(rotate, rotations):
    def counted(*args, **kwargs):
        rotations[0] += 1
        return rotate(*args, **kwargs)

    return counted


def _recording(attend, calls, rotations):
    last = {}

    def recorded(module, query, key, value, attention_mask=None, *args, **kwargs):
        result = attend(module, query, key, value, attention_mask, *args, **kwargs)
        scale = kwargs.get("scaling", args[0] if args else None)
        # Of several calls of one module, queries and keys are rotated before the first.
        rotated = rotations[0] > 0 or (last.get("module") is module and last["rotated"])
        last.update(module=module, rotated=rotated)
        calls.append(
            Call(
                layer=getattr(module, "layer_idx", None),
                module=type(module).__name__,
                **{name: tokens_first(array) for name, array in (("query", query), ("key", key), ("value", value))},
                out=result[0].numpy(),
                mask=None if attention_mask is None else attention_mask.numpy(),
                scale=scale,
                rotated=rotated,
                more={name: as_numpy(value) for name, value in kwargs.items() if name != "scaling"},
            )
        )
        rotations[0] = 0
        return result

    return recorded


def tokens_first(array):
    return array.numpy().swapaxes(1, 2)


def as_numpy(value):
    return value.detach().numpy() if hasattr(value, "detach") else value
