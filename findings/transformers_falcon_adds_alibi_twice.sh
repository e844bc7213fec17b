#!/usr/bin/env bash
# Falcon with alibi=True puts the bias, divided by the root of the head's size, into the mask that it hands to its layers. The
# layers of attn_implementation="eager" then add the bias to the logits once more, those of "sdpa" do not: the same weights and
# the same tokens give two outputs, and the default is sdpa. output_attentions=True computes as eager does, also in a model with
# sdpa. With half of the bias eager gives what sdpa gives. Without ALiBi the two agree.
# Seen with transformers 5.24.0 and torch 2.13.0 on CPU; so the output to reproduce is sdpa's, and the attentions are another's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.24.0" "torch==2.13.0"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
from unittest import mock

import torch
import transformers
from transformers import FalconConfig, FalconModel
from transformers.models.falcon import modeling_falcon

sizes = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
ids = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(0))
whole = modeling_falcon.build_alibi_tensor


def output(implementation, alibi=True, **options):
    torch.manual_seed(0)  # the same weights each time
    model = FalconModel(FalconConfig(**sizes, alibi=alibi, attn_implementation=implementation)).eval()
    with torch.no_grad():
        return model(ids, **options).last_hidden_state


def off(one, other):
    return float((one - other).abs().max())


sdpa, without = output("sdpa"), off(output("eager", alibi=False), output("sdpa", alibi=False))
eager, asked = off(output("eager"), sdpa), off(output("sdpa", output_attentions=True), sdpa)
with mock.patch.object(modeling_falcon, "build_alibi_tensor", lambda *inputs, **options: whole(*inputs, **options) / 2):
    half = off(output("eager"), sdpa)
print(f"off from sdpa: eager {eager:.2f}, sdpa with output_attentions {asked:.2f}, eager with half of the bias {half:.0e}")
print(f"without ALiBi: eager off from sdpa by {without:.0e}")
assert without < 1e-5 and half < 1e-5 < 0.1 < eager, (without, half, eager)
assert abs(asked - eager) < 1e-4, (asked, eager)
print("transformers", transformers.__version__, "torch", torch.__version__)
PY
