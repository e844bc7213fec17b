#!/usr/bin/env bash
# One file with the operator Attention of opset 23, a boolean mask and a soft cap of 2. Keys 3 to 5 are hidden by the mask. In
# ONNX's own reference evaluator of onnx 1.21.0 and in ONNX Runtime 1.26.0 each of them gets 4 % of the probability, for the
# mask's -inf goes through the cap and comes out as -2. With onnx 1.23.2 and ONNX Runtime 1.32.0 the same bytes give them none:
# the order of cap and mask was changed, and the number of the opset was not. A row that the mask hides whole, without a cap, is
# NaN in onnx 1.21.0, the mean of all values in ONNX Runtime 1.26.0, and 0 in the later two.
# So a model that was validated with one version means another thing in the next.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/attend.py" <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

S = 6
path, wanted = sys.argv[1], sys.argv[2]
zeros, identity = np.zeros((1, 1, S, S), np.float32), np.eye(S, dtype=np.float32)[None, None]  # so the output is probabilities
masks = {"three keys hidden": np.broadcast_to(np.arange(S) < 3, (S, S)), "all keys hidden": np.zeros((S, S), bool)}


def saved(name, **attributes):
    """Written by the first version that runs, read by both."""
    file = f"{path}/{name}.onnx"
    if wanted == "old":
        shapes = {"Q": zeros.shape, "K": zeros.shape, "V": zeros.shape}
        inputs = [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in shapes.items()]
        inputs.append(helper.make_tensor_value_info("attn_mask", TensorProto.BOOL, (S, S)))
        outputs = [helper.make_tensor_value_info("Y", TensorProto.FLOAT, identity.shape)]
        node = helper.make_node("Attention", ["Q", "K", "V", "attn_mask"], ["Y"], **attributes)
        graph = helper.make_graph([node], "one", inputs, outputs)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), file)
    onnx.checker.check_model(onnx.load(file))
    return file


def row(file, mask):
    """The first row of both implementations."""
    inputs = {"Q": zeros, "K": zeros, "V": identity, "attn_mask": masks[mask]}
    with np.errstate(invalid="ignore"):
        reference = ReferenceEvaluator(onnx.load(file)).run(None, inputs)[0]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [np.round(out[0, 0, 0], 2).tolist() for out in (reference, session.run(None, inputs)[0])]


capped = row(saved("capped", softcap=2.0), "three keys hidden")
empty = row(saved("plain"), "all keys hidden")
for name, rows in (("soft cap, keys 3 to 5 hidden", capped), ("no soft cap, all hidden", empty)):
    for library, found in zip((f"onnx {onnx.__version__}", f"ONNX Runtime {onnxruntime.__version__}"), rows):
        print(f"{name}: {library}:", *(f"{probability:.2f}" for probability in found))
shown, nan = [0.29, 0.29, 0.29, 0.04, 0.04, 0.04], float("nan")
expected = {
    "old": ([shown, shown], [[nan] * S, [0.17] * S]),
    "new": ([[0.33, 0.33, 0.33, 0.0, 0.0, 0.0]] * 2, [[0.0] * S] * 2),
}[wanted]
np.testing.assert_allclose(capped, expected[0], atol=0.005)
np.testing.assert_allclose(empty, expected[1], atol=0.005)
PY
for versions in "old 1.21.0 1.26.0" "new 1.23.2 1.32.0"; do
  read -r name onnx runtime <<< "$versions"
  python3 -m venv "$folder/$name"
  "$folder/$name/bin/pip" install --quiet --disable-pip-version-check "onnx==$onnx" "onnxruntime==$runtime"
  "$folder/$name/bin/python" "$folder/attend.py" "$folder" "$name"
done
