#!/usr/bin/env bash
# GemmaConfig(use_bidirectional_attention=True) says that every token attends to all tokens. The layers read it, the mask does
# not: where a mask is made, it is causal. So eager and flex attention stay causal. With sdpa, the default, no mask is made for
# a sentence alone, and its tokens see later ones; in a batch with padding a mask is made, and the same sentence is read
# causally again. Gemma 2 always makes a mask, and there the option changes nothing. In Gemma 3 it does what it says.
# Seen with transformers 5.24.0 and torch 2.13.0 on CPU; adding is_causal=False to Gemma's config makes all three see both ways.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.24.0" "torch==2.13.0"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
from transformers import Gemma2Config, Gemma2Model, Gemma3TextConfig, Gemma3TextModel, GemmaConfig, GemmaModel

torch.compiler.set_stance("force_eager")  # flex attention runs uncompiled and needs no compiler
sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, initializer_range=0.2)
S = 8
ids = torch.randint(0, 97, (1, S), generator=torch.Generator().manual_seed(0))
alone, padded = (torch.cat([torch.ones(1, S), torch.zeros(1, count)], dim=1).long() for count in (0, 3))


def outputs(classes, implementation, mask, **options):
    """Of the sentence, and of the sentence with another last token."""
    config, model = classes
    torch.manual_seed(0)  # the same weights each time
    model = model(config(**sizes, **options, attn_implementation=implementation)).eval()
    read = torch.nn.functional.pad(ids, (0, mask.shape[1] - S))
    changed = read.clone()
    changed[0, S - 1] += 1 if ids[0, -1] < 96 else -1
    with torch.no_grad():
        return [model(tokens, attention_mask=mask).last_hidden_state[:, :S] for tokens in (read, changed)]


def sees_later(name, classes, implementation, mask, **options):
    plain, changed = outputs(classes, implementation, mask, **options)
    causal, _ = outputs(classes, implementation, alone)
    moved, off = float((plain - changed)[:, 0].abs().max()), float((plain - causal).abs().max())
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    form = "padded" if mask is padded else "alone"
    print(f"{name}, {implementation}, {form}, {shown}: token 0 moves by {moved:.2f} with the last, off causal by {off:.2f}")
    assert (moved > 0.1) == (off > 0.1) and (moved < 1e-5) == (off < 1e-5), (moved, off)
    return moved > 0.1


gemma, gemma2, gemma3 = (GemmaConfig, GemmaModel), (Gemma2Config, Gemma2Model), (Gemma3TextConfig, Gemma3TextModel)
for implementation in ("eager", "flex_attention", "sdpa"):
    for mask in (alone, padded):
        seen = sees_later("Gemma", gemma, implementation, mask, use_bidirectional_attention=True)
        assert seen == (implementation == "sdpa" and mask is alone)
        assert sees_later("Gemma", gemma, implementation, mask, use_bidirectional_attention=True, is_causal=False)
        if implementation != "sdpa":  # Gemma 2 has no sdpa
            assert not sees_later("Gemma 2", gemma2, implementation, mask, use_bidirectional_attention=True)
        assert sees_later("Gemma 3", gemma3, implementation, mask, use_bidirectional_attention=True)
print("transformers", transformers.__version__, "torch", torch.__version__)
PY
