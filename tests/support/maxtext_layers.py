"""Asks the installed MaxText how every layer of a model attends, and writes the record in tests/fixtures.

The decoder is built and called abstractly, layer by layer, and what reaches AttentionOp is noted: types and sizes, the
shapes of queries, keys and values, sinks, the mask of an indexer or of images, whether a rotary embedding was called
before, and whose keys are read. Nothing is computed. `python tests/support/maxtext_layers.py` writes the record anew,
from MaxText 0.2.5 in .venv-maxtext.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import json
import logging
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

RECORD = pathlib.Path(__file__).parents[1] / "fixtures" / "maxtext_layers.json"

_RUN = {
    "run_name": "layers",
    "base_output_directory": "unused",
    "skip_jax_distributed_system": True,
    "enable_checkpointing": False,
    "enable_dropout": False,
    "override_model_config": True,
    "per_device_batch_size": 1,
    "max_target_length": 4096,  # more than any indexer's choice of keys
    "scan_layers": False,
    "attention": "dot_product",  # which every block has
    "engram_layers": [],  # a part of deepseek-custom that needs a tokenizer, and is not attention
    "use_batch_split_schedule": False,  # another order of the same computation, for meshes
    "shard_mode": "auto",
}
_UNNAMED = ("llama3-405b",)
"""The models that MaxText has a file of, and refuses as `model_name`: their options are given one by one."""

_PLAIN = {
    "default": "",
    "llama2": "llama2-7b",
    "mistral": "mistral-7b",
    "mixtral": "mixtral-8x7b",
    "deepseek": "deepseek3-tiny",
    "deepseek4": "deepseek4-tiny",
    "envy": "envy-test",
    "gemma": "gemma-2b",
    "gemma2": "gemma2-2b",
    "gemma3": "gemma3-4b",
    "gemma4": "gemma4-26b",
    "gemma4_small": "gemma4-e4b",
    "gpt3": "gpt3-6b",
    "gpt_oss": "gpt-oss-20b",
    "llama4": "llama4-17b-16e",
    "olmo3": "olmo3-7b",
    "qwen2": "qwen2.5-1.5b",
    "qwen3": "qwen3-0.6b",
    "qwen3_moe": "qwen3-30b-a3b",
    "qwen3_custom_moe": "qwen3-custom-30b-a3b",
    "qwen3_next": "qwen3-next-80b-a3b",
    "qwen3_5": "qwen3.5-35b-a3b",
}
"""A model of every decoder block that attends, whose options are varied."""

_SIZES = {"sliding_window_size": 5, "chunk_attn_window_size": 6}
_EVERY_BLOCK = {
    "cap": {"attn_logits_soft_cap": 7.0, "attention_sink": True, **_SIZES},
    "sizes": {
        "global_num_kv_heads": 2,
        "global_head_dim": 64,
        "global_parameter_scale": 8,
        "nope_layer_interval": 3,
        "inhomogeneous_layer_cycle_interval": 2,
    },
    "local": {"attention_type": "local_sliding", **_SIZES},
    "mla": {"attention_type": "mla"},
    "blocks": {"attention_type": "block_diffusion", "packing": False, "causal_block_size": 4},
    "fewer": {"base_num_query_heads": 16, "base_num_kv_heads": 4},
}
_SOME_BLOCKS = {
    "gemma3/images": {"use_multimodal": True},
    "gemma4/images": {"use_multimodal": True},
    "gemma4_small/images": {"use_multimodal": True},
    "llama4/images": {"use_multimodal": True},
    "gemma4_small/shared": {"num_kv_shared_layers": 5, "base_num_decoder_layers": 12},
    "gemma4_small/no donor": {"num_kv_shared_layers": 3},
    "llama4/no interval": {"nope_layer_interval": -1},
    "deepseek/absorbed": {"use_mla_absorbed_mqa": True, "mla_naive_kvcache": False},
    "deepseek/indexer": {"use_indexer": True, "indexer_topk": 16},
    "deepseek/dims": {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 48},
    "gpt_oss/scanned": {"scan_layers": True},
    "olmo3/scanned": {"scan_layers": True},
    "llama4/scanned": {"scan_layers": True},
    "envy/scanned": {"scan_layers": True},
    "qwen3_5/scanned": {"scan_layers": True},
    "gemma2/scanned": {"scan_layers": True},
    "gpt_oss/scanned one by one": {"scan_layers": True, "inhomogeneous_layer_cycle_interval": 1},
    "olmo3/scanned with a rest": {"scan_layers": True, "base_num_decoder_layers": 6},
    "llama4/scanned out of step": {"scan_layers": True, "nope_layer_interval": 3},
    "llama2/scanned in cycles": {"scan_layers": True, "inhomogeneous_layer_cycle_interval": 2},
    "deepseek4/ratios": {"compress_ratios": [4, 0, 128, 0, 0, 4, 4, 0]},
}


def variations() -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns the model and the options of each question about options, by `block/name`."""
    named = {f"{block}/{name}": given for block in _PLAIN for name, given in _EVERY_BLOCK.items()} | _SOME_BLOCKS
    found = {}
    for key, given in named.items():
        block = key.split("/")[0]
        found[key] = (_PLAIN[block], {"decoder_block": block, "base_num_decoder_layers": 8, **given})
    return found


class Recorder:
    """Notes what reaches MaxText's attention while its functions are replaced."""

    def __init__(self) -> None:
        self.notes: list[dict[str, Any]] = []
        self._rotations = 0
        self._donors: list[tuple[Any, int]] = []
        self._owner: list[tuple[Any, int | None]] = []

    def operation(self, original, op, query, key, value, *rest, **named):
        """AttentionOp.__call__: notes the call, and answers zeros."""
        import jax.numpy as jnp

        given = inspect.signature(original).bind(op, query, key, value, *rest, **named).arguments
        note = {
            "type": op.attention_type.value,
            "window": op.sliding_window_size if op.attention_type.value == "local_sliding" else None,
            "chunk_size": op.chunk_attn_window_size if op.attention_type.value == "chunk" else None,
            "block_size": op.causal_block_size if op.attention_type.value == "block_diffusion" else None,
            "soft_cap": op.attn_logits_soft_cap,
            "sinks": given.get("sinks") is not None,
            "q_heads": query.shape[2],
            "kv_heads": key.shape[2],
            "head_dim": query.shape[3],
            "value_dim": value.shape[3],
            "rope": self._rotations > 0,
            "indexer": given.get("indexer_mask") is not None,
            "bidirectional": given.get("bidirectional_mask") is not None,
            "reads": self._owner[-1][1] if self._owner else None,
        }
        if note["type"] == "compressed":
            note = {"type": "compressed", "reads": None}
        self.notes.append(note)
        self._rotations = 0
        return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)

    def attention(self, original, layer, *operands, **named):
        """Attention.__call__: finds the layer whose keys it is given."""
        shared = named.get("shared_key")
        donor = next((number for key, number in self._donors if key is shared), None)
        self._owner.append((layer, None if donor == len(self.notes) else donor))
        try:
            return original(layer, *operands, **named)
        finally:
            self._owner.pop()

    def rotation(self, original, *operands, **named):
        """A rotary embedding's __call__."""
        self._rotations += 1
        return original(*operands, **named)

    def donor(self, original, *operands, **named):
        """Attention.compute_shared_kv: remembers whose keys they are."""
        key, value = original(*operands, **named)
        self._donors.append((key, len(self.notes)))
        return key, value

    def linear(self, original, *operands, **named):
        """The gated delta net's __call__."""
        self.notes.append({"type": "linear", "reads": None})
        return original(*operands, **named)


def _module(name: str) -> Any:
    return importlib.import_module(f"maxtext.{name}")


@contextlib.contextmanager
def _replaced(recorder: Recorder) -> Iterator[None]:
    embeddings, attentions = _module("layers.embeddings"), _module("layers.attentions")
    rotary = [
        kind
        for name, kind in vars(embeddings).items()
        if inspect.isclass(kind) and "Rotary" in name and "__call__" in vars(kind)
    ]
    places = [(kind, "__call__", recorder.rotation) for kind in rotary]
    places += [
        (_module("layers.attention_op").AttentionOp, "__call__", recorder.operation),
        (attentions.Attention, "__call__", recorder.attention),
        (attentions.Attention, "compute_shared_kv", recorder.donor),
        (_module("models.qwen3").Qwen3NextGatedDeltaNet, "__call__", recorder.linear),
    ]
    originals = [(kind, name, vars(kind)[name]) for kind, name, _ in places]
    for (kind, name, noted), (*_, original) in zip(places, originals, strict=True):
        setattr(kind, name, _with_original(noted, original))
    try:
        yield
    finally:
        for kind, name, original in originals:
            setattr(kind, name, original)


def _with_original(noted: Any, original: Any) -> Any:
    @functools.wraps(original)
    def call(self, *operands, **named):
        return noted(original, self, *operands, **named)

    return call


def _config(model: str, options: Mapping[str, Any]) -> Any:
    pyconfig = _module("configs.pyconfig")
    base = pathlib.Path(pyconfig.__file__).with_name("base.yml")
    given = {**_RUN, **options}
    if model in _UNNAMED:
        given = {**yml(model), **given}
    elif model:
        given["model_name"] = model
    return pyconfig.initialize(["layers", str(base)], **given)


def yml(model: str) -> dict[str, Any]:
    """Returns the content of a model's file."""
    import yaml

    return yaml.safe_load((folder() / "models" / f"{model}.yml").read_text(encoding="utf-8")) or {}


def folder() -> pathlib.Path:
    """Returns MaxText's folder of configs; there may be none."""
    found = importlib.util.find_spec("maxtext")
    places = found.submodule_search_locations if found else ()
    return next((pathlib.Path(place, "configs") for place in places), pathlib.Path("/nowhere"))


def models() -> list[str]:
    """Returns the names of the models that MaxText has a file of."""
    return sorted(path.stem for path in (folder() / "models").glob("*.yml"))


def ask(model: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the kinds of layers that MaxText builds, each with its layers.

    Args:
      model: its name, or "" for base.yml alone.
      options: over its own.

    Raises:
      Exception: MaxText refuses, with an error of its own.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    config = _config(model, options)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(config.mesh_axes)), config.mesh_axes)
    recorder = Recorder()
    steps = 1

    def run():
        nonlocal steps
        transformer = _module("models.models").Transformer(config, mesh, quant=None, rngs=nnx.Rngs(0))
        if config.scan_layers:  # the layers of one step are called once, and their parameters are stacked
            stacked = jax.tree.leaves(nnx.state(transformer.decoder.layers, nnx.Param))
            (steps,) = {array.shape[config.param_scan_axis] for array in stacked if array.ndim > 1}
        ids = jnp.zeros((1, config.max_target_length), jnp.int32)
        images = _module("common.common_types").MultimodalInput(bidirectional_mask=ids > 0)
        transformer.decoder(
            transformer.token_embedder,
            ids,
            ids + jnp.arange(config.max_target_length),
            decoder_segment_ids=ids + 1,
            deterministic=True,
            multimodal_input=images if config.use_multimodal else None,
        )

    with mesh, _replaced(recorder):
        nnx.eval_shape(run)
    return _kinds(recorder.notes * steps)


def _kinds(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {}
    for layer, note in enumerate(notes):
        facts = {name: value for name, value in note.items() if name != "reads" and value not in (None, False)}
        kind = kinds.setdefault(json.dumps(facts), {**facts, "layers": [], "shared_kv": []})
        kind["layers"].append(layer)
        kind["shared_kv"] += [] if note["reads"] is None else [[layer, note["reads"]]]
    return list(kinds.values())


def described(model: Any) -> list[dict[str, Any]]:
    """Returns a model's description in the record's words."""
    kinds = [
        {
            "type": kind.config.type.value,
            **{name: getattr(kind.config, name) for name in _FIELDS},
            "rope": kind.rope,
            "indexer": any("indexer" in remark for remark in kind.remarks),
            "bidirectional": kind.bidirectional == "image",
            "layers": list(kind.layers),
            "shared_kv": [list(pair) for pair in kind.shared_kv],
        }
        for kind in model.kinds
    ]
    kinds += [
        {"type": other.name.removesuffix("_attention"), "layers": list(other.layers), "shared_kv": []}
        for other in model.others
    ]
    found = [{name: value for name, value in kind.items() if value not in (None, False)} for kind in kinds]
    return sorted(found, key=lambda kind: kind["layers"])


_FIELDS = ("window", "chunk_size", "block_size", "soft_cap", "sinks", "q_heads", "kv_heads", "head_dim", "value_dim")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences MaxText's warnings and logs, and lets it promote ranks."""
    import jax

    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def answer(model: str, options: Mapping[str, Any]) -> list[dict[str, Any]] | str:
    """Returns what `ask` does, or the name of the error that MaxText raises."""
    try:
        return ask(model, options)
    except (Exception, SystemExit) as error:  # whatever it is, it is the answer
        return type(error).__name__


def _written(record: Mapping[str, Any]) -> str:
    """Returns JSON with a line for each model and kind."""
    lines = []
    for part in ("models", "variations"):
        entries = []
        for name, entry in record[part].items():
            answer = entry["layers"]
            rows = answer if isinstance(answer, str) else [json.dumps(kind) for kind in answer]
            body = json.dumps(answer) if isinstance(answer, str) else "[\n    " + ",\n    ".join(rows) + "]"
            model = "" if part == "models" else f'"model": {json.dumps(entry["model"])}, '
            entries.append(
                f'  {json.dumps(name)}: {{{model}"options": {json.dumps(entry["options"])},\n   "layers": {body}}}'
            )
        lines.append(f' "{part}": {{\n' + ",\n".join(entries) + "\n }")
    return f'{{\n "maxtext": {json.dumps(record["maxtext"])},\n' + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Writes the record."""
    from kernelry.config.maxtext.blocks import MODEL
    from kernelry.config.maxtext.options import MESH, OPTIONS

    read = ({option.name for option in OPTIONS} | MODEL.keys()) - MESH
    record: dict[str, Any] = {"maxtext": importlib.metadata.version("maxtext"), "models": {}, "variations": {}}
    with quiet():
        for model in models():
            options = {name: value for name, value in yml(model).items() if name in read}
            record["models"][model] = {"options": options, "layers": answer(model, {})}
        for name, (model, options) in variations().items():
            record["variations"][name] = {"model": model, "options": options, "layers": answer(model, options)}
    RECORD.write_text(_written(record), encoding="utf-8")


if __name__ == "__main__":
    main()
