#!/usr/bin/env bash
# attn_logit_softcapping of Gemma 3's config is described as the tanh soft cap of the attention scores. The layers store it and
# never apply it: with eager and sdpa alike every value of it, None included, gives the same output to the bit. In Gemma 2 the
# same option changes the output. Gemma 3's eager attention can cap: softcap= as a keyword of the model's call reaches it, and
# then the output changes as in Gemma 2, while sdpa refuses the keyword.
# Seen with transformers 5.24.0 and torch 2.13.0 on CPU; so a port that caps as the config says is wrong for Gemma 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.24.0" "torch==2.13.0"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
from transformers import Gemma2Config, Gemma2Model, Gemma3TextConfig, Gemma3TextModel

sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=1, initializer_range=0.2)
ids = torch.randint(0, 97, (1, 8), generator=torch.Generator().manual_seed(0))


def output(config, model, implementation, cap, **options):
    torch.manual_seed(0)  # the same weights each time
    model = model(config(**sizes, attn_logit_softcapping=cap, attn_implementation=implementation)).eval()
    with torch.no_grad():
        return model(ids, **options).last_hidden_state


gemma2, gemma3 = (Gemma2Config, Gemma2Model), (Gemma3TextConfig, Gemma3TextModel)
for name, classes, implementation in (("Gemma 2", gemma2, "eager"), ("Gemma 3", gemma3, "eager"), ("Gemma 3", gemma3, "sdpa")):
    plain = output(*classes, implementation, None)
    for cap in (50.0, 5.0, 0.5):
        off = float((output(*classes, implementation, cap) - plain).abs().max())
        print(f"{name}, {implementation}: attn_logit_softcapping={cap} changes the output by {off:.1e}")
        assert off > 1e-2 if name == "Gemma 2" else off == 0, off

plain = output(*gemma3, "eager", None)
off = float((output(*gemma3, "eager", None, softcap=0.5) - plain).abs().max())
print(f"Gemma 3, eager: softcap=0.5 as a keyword of the call changes the output by {off:.1e}")
assert off > 1e-2, off
try:
    output(*gemma3, "sdpa", None, softcap=0.5)
except ValueError as error:
    refused = str(error)
print("Gemma 3, sdpa:", refused)
assert "does not support `softcap`" in refused
print("transformers", transformers.__version__, "torch", torch.__version__)
PY
