#!/usr/bin/env bash
# Two sequences packed into one row, told apart by position_ids that start again at 0, as DataCollatorWithFlattening makes
# them. With use_cache=False the logits are those of the two sequences alone. With use_cache=True, which is the default,
# also in training, the second sequence attends to the first, silently: packing is looked for only where there is no cache, and
# a model that may return a cache makes one before it looks. An attention_mask of ones does the same. The prompt is the same,
# the cache is empty, and nothing warns.
# Seen with transformers 5.24.0 and torch 2.13.0 on CPU, eager and sdpa; so pack with use_cache=False and without a mask.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.24.0" "torch==2.13.0"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
packed = DataCollatorWithFlattening()([{"input_ids": [5, 11, 23, 42]}, {"input_ids": [7, 19, 3]}])
ids, positions = packed["input_ids"], packed["position_ids"]
print("position_ids", positions.tolist())
for implementation in ("eager", "sdpa"):
    model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=implementation))
    alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)

    def differs(**options):
        """The largest difference of a logit in the first and in the second sequence."""
        difference = (model(ids, position_ids=positions, **options).logits - alone).detach().abs().amax(dim=(0, 2))
        return float(difference[:4].max()), float(difference[4:].max())

    for training in (False, True):
        model.train(training)
        calls = {
            "use_cache=False": dict(use_cache=False),
            "the default": {},
            "use_cache=False and a mask of ones": dict(use_cache=False, attention_mask=torch.ones_like(ids)),
        }
        for name, options in calls.items():
            first, second = differs(**options)
            print(f"{implementation}, training={training}, {name}: first sequence off by {first:.0e}, second by {second:.0e}")
            assert first < 1e-5, first
            assert (second < 1e-5) == (name == "use_cache=False"), second
print("transformers", transformers.__version__, "torch", torch.__version__)
PY
