#!/usr/bin/env bash
# tokamax ships the fastest tiling of its search, and its milliseconds, for many shapes of attention on TPU7x. Releases 0.0.12
# and 0.0.17 have 112 calls with bfloat16 in common, 76 forward and 36 backward. The winner is another in 41 of them, and has
# other blocks in 11: for 4 x 4096 causal tokens and 16 heads of 128, blocks of 2048 with 256 keys at a time and 1.473 ms became
# blocks of 1024 with 512 keys at a time and 1.355 ms. It is not that the search grew: each of the 41 later winners was in the
# search of 0.0.12 too.
# Seen in the files of both releases, and in the search of 0.0.12 with jax 0.10.2 on CPU; nothing is timed here. So a tiling that
# was tuned with one release is a guess with the next, also on the same chip, and a winner has to be quoted with its release.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" "$1" --quiet --disable-pip-version-check "${@:2}"; }
pip install "tokamax==0.0.12" "jax==0.10.2" "jaxlib==0.10.2"
# Of the later release only the files are read, so that any Python will do.
pip download --no-deps --only-binary :all: --python-version 3.12 --dest "$folder/wheels" "tokamax==0.0.17"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder"/wheels/*.whl <<'PY'
import json
import statistics
import sys
import zipfile
from importlib import metadata, resources

import jax
import jax.numpy as jnp
from tokamax._src.ops.attention import pallas_mosaic_tpu as forward
from tokamax._src.ops.attention import pallas_mosaic_tpu_vjp as backward

FOLDER = "data/autotuning/tpu7x"
FILES = {"forward": "pallas_mosaic_tpu_flash_attention.json", "backward": "pallas_mosaic_tpu_flash_attention_vjp.json"}
COUNTS = {"forward": (76, 40, 10), "backward": (36, 1, 1)}
PRECISIONS = (["BF16_BF16_F32"] * 2, [["DEFAULT"] * 2] * 2)  # two names of one pass over bfloat16
CAUSAL = (True, {"offset": 0, "window_size": None})


def winners(text):
    """The winning tiling and the median of its milliseconds by call, which is written alike for both releases."""
    found = {}
    for key, tilings in json.loads(text).items():
        call = json.loads(key)
        if not tilings or not call["q"].startswith("bf16"):
            continue
        assert call.pop("precision") in PRECISIONS
        named = call["mask"].pop("is_causal" if "is_causal" in call["mask"] else "causal_mask")
        assert named in (*CAUSAL, False, None), named
        call["mask"]["causal"] = named in CAUSAL
        [(tiling, measured)] = tilings.items()
        found[json.dumps(call, sort_keys=True)] = json.loads(tiling), statistics.median(measured["evaluation_times_ms"])
    return found


def blocks(tiling):
    return tuple(size for name, size in tiling.items() if name.startswith("block"))


def searched(name, call):
    """The tilings that the installed release would try."""
    arrays = [jax.ShapeDtypeStruct(json.loads(call[side].removeprefix("bf16")), jnp.bfloat16) for side in "qkv"]
    operation = forward.PallasMosaicTpuFlashAttention()
    bound = operation.bind(*arrays)
    return (operation if name == "forward" else operation.vjp)._get_autotuning_configs(bound)


seen = {}
for (name, file), module in zip(FILES.items(), (forward, backward)):
    earlier = winners(resources.files("tokamax").joinpath(FOLDER, file).read_text())
    later = winners(zipfile.ZipFile(sys.argv[1]).read(f"tokamax/{FOLDER}/{file}"))
    both = sorted(set(earlier) & set(later))
    differ = [call for call in both if earlier[call][0] != later[call][0]]
    changed = [call for call in differ if blocks(earlier[call][0]) != blocks(later[call][0])]
    print(f"{name}: {len(both)} calls in both releases, {len(differ)} with other tilings, {len(changed)} with other blocks")
    for call in differ:
        asked, tiling = json.loads(call), later[call][0]
        assert module.Config(**tiling) in searched(name, asked), tiling
        if call in changed:
            mask = "causal" if asked["mask"]["causal"] else "full"
            shown = f"{name} {asked['q']} {mask}" + (", residuals" if asked["return_residuals"] else "")
            seen[shown] = [(blocks(tiling), time) for tiling, time in (earlier[call], later[call])]
            print(f"  {shown}: " + ", then ".join(f"{'/'.join(map(str, sizes))} {time} ms" for sizes, time in seen[shown]))
    assert (len(both), len(differ), len(changed)) == COUNTS[name]
expected = [((2048, 2048, 256), 1.473), ((1024, 1024, 512), 1.355)]
assert seen["forward bf16[4,4096,16,128] causal"] == expected, seen
print("tokamax", metadata.version("tokamax"), "and 0.0.17, jax", jax.__version__)
PY
