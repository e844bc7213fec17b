#!/usr/bin/env bash
# A floating attention mask of four dimensions, [batch, heads, queries, keys], is taken as it is and added to the logits: so a
# bias for each head, such as ALiBi's slopes, can be passed to a model. With attn_implementation="eager" and "sdpa" each head
# has its own. With "flex_attention" every head gets the bias of head 0: the other heads' could be anything, NaN included, and
# the output would not change. Nothing is refused and nothing warns of it.
# Seen with transformers 5.24.0 and torch 2.13.0 on CPU; flex attention runs uncompiled here, which changes no number that
# matters, and needs no compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.24.0" "torch==2.13.0"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaModel

torch.compiler.set_stance("force_eager")
HEADS, S = 4, 8
sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS)
torch.manual_seed(0)
ids = torch.randint(0, 97, (1, S))
distance = torch.arange(S)[:, None] - torch.arange(S)[None]
slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
causal = torch.full((S, S), -1e9).triu(1)
each_head = (causal - slopes[:, None, None] * distance.abs())[None]  # [1, N, T, S]
head_0 = each_head[:, :1].expand_as(each_head)
others_nan = torch.where(torch.arange(HEADS)[None, :, None, None] > 0, torch.nan, each_head)
weights, outputs = None, {}
for implementation in ("eager", "sdpa", "flex_attention"):
    model = LlamaModel(LlamaConfig(**sizes, attn_implementation=implementation)).eval()
    weights = weights or model.state_dict()
    model.load_state_dict(weights)
    with torch.no_grad():
        outputs[implementation], alike = (model(ids, attention_mask=m).last_hidden_state for m in (each_head, head_0))
        spoilt = bool(model(ids, attention_mask=others_nan).last_hidden_state.isnan().any())
    difference = float((outputs[implementation] - alike).abs().max())
    off = float((outputs[implementation] - outputs["eager"]).abs().max())
    print(f"{implementation}: head 0's bias for all heads changes the output by {difference:.1e}; off from eager by {off:.1e}; "
          f"NaN in the others' gives NaN: {spoilt}")
    assert spoilt == (implementation != "flex_attention"), spoilt
    assert (difference == 0) == (implementation == "flex_attention"), difference
    assert (off < 1e-5) == (implementation != "flex_attention"), off
print("transformers", transformers.__version__, "torch", torch.__version__)
PY
