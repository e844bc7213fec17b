#!/usr/bin/env bash
# Falcon makes a boolean mask for sdpa, its default, True where a token is seen. Asked for output_attentions=True in the call, a
# layer takes its own way instead of sdpa and adds that mask to the logits: a visible token gets 1 more, a later token 0, so
# every token sees the whole row, and one that it should not see has 1/e of the weight. The output changes, the attentions show
# it, and nothing warns. With attn_implementation="eager" the first token's output does not change with the last token.
# Seen with transformers 5.24.0 and torch 2.13.0 on CPU; config.output_attentions=True is refused with sdpa, the call's is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.24.0" "torch==2.13.0"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
from transformers import FalconConfig, FalconModel

sizes = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
S = 8
ids = torch.randint(0, 97, (1, S), generator=torch.Generator().manual_seed(0))
changed = ids.clone()
changed[0, -1] += 1 if ids[0, -1] < 96 else -1


def outputs(implementation=None, silent_queries=False, mask=None, asked=False):
    """Of the tokens, and of the tokens with another last one; layer 0's attentions, if asked for; the implementation used."""
    torch.manual_seed(0)  # the same weights each time
    model = FalconModel(FalconConfig(**sizes, attn_implementation=implementation)).eval()
    if silent_queries:  # so that each logit is what is added to it
        model.h[0].self_attention.query_key_value.weight.data.zero_()
    with torch.no_grad():
        first, second = (model(each, attention_mask=mask, output_attentions=asked) for each in (ids, changed))
    attentions = first.attentions[0][0, 0] if asked else None
    return first.last_hidden_state, second.last_hidden_state, attentions, model.config._attn_implementation


expected, _, _, default = outputs()
assert default == "sdpa", default
for implementation in ("eager", None):
    for asked in (False, True):
        for mask in (None, torch.ones_like(ids)):
            first, second, _, used = outputs(implementation, mask=mask, asked=asked)
            moved, off = float((first - second)[:, 0].abs().max()), float((first - expected).abs().max())
            print(f"{used}, output_attentions={asked}, {'no mask' if mask is None else 'a mask of ones'}: "
                  f"token 0 moves by {moved:.2f} with the last token, output off by {off:.2f}")
            if used == "sdpa" and asked:
                assert moved > 0.1 and off > 0.1, (moved, off)
            else:
                assert moved == 0 and off < 1e-5, (moved, off)
_, _, weights, _ = outputs(silent_queries=True, asked=True)
print("sdpa, all logits 0, row 2 of the attentions:", *(f"{weight:.3f}" for weight in weights[2].tolist()))
torch.testing.assert_close(weights, torch.softmax(torch.ones(S, S).tril(), dim=-1))
print("transformers", transformers.__version__, "torch", torch.__version__)
PY
