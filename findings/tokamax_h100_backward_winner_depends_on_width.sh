#!/usr/bin/env bash
# tokamax ships milliseconds of its attention on an H100, for the best tiling of each of its two kernels: one in Pallas Triton,
# one in Mosaic GPU, which is tried first. In all 204 forward calls that both files have, Mosaic is faster, and most of all at
# head dimension 256, where it takes 0.49 to 0.62 of Triton's time. Backward it is faster in each of the calls at 64 and 128 and
# slower in each of the 76 calls at 16, 32 and 256, by up to 1.35 at 256 and 1.48 at 16. So what is fastest forward is not what
# is fastest backward, though a call of the one takes its own kernel for the other.
# Read from the files of tokamax 0.0.17; nothing is timed here. The file of gradients names its calls with the arrays of the
# forward pass, so both are grouped by the head dimensions of queries and values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Only the files are read, so that any Python will do.
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.12 \
    --dest "$folder/wheels" "tokamax==0.0.17"
"$folder/venv/bin/python" - "$folder"/wheels/*.whl <<'PY'
import collections
import json
import statistics
import sys
import zipfile

FOLDER = "tokamax/data/autotuning/nvidia_h100_80gb_hbm3"
KERNELS = ("pallas_mosaic_gpu_flash_attention", "pallas_triton_flash_attention")
wheel = zipfile.ZipFile(sys.argv[1])


def milliseconds(kernel):
    """The best median by call."""
    found = {}
    for call, tilings in json.loads(wheel.read(f"{FOLDER}/{kernel}.json")).items():
        times = [statistics.median(measured["evaluation_times_ms"]) for measured in tilings.values()]
        if times:
            found[call] = min(times)
    return found


def width(array):
    return json.loads(array[array.index("[") :])[-1]


def ratios(ending):
    """Mosaic's time over Triton's, by the head dimensions of queries and values."""
    mosaic, triton = (milliseconds(kernel + ending) for kernel in KERNELS)
    found = collections.defaultdict(list)
    for call in set(mosaic) & set(triton):
        arrays = json.loads(call)
        found[width(arrays["q"]), width(arrays["v"])].append(mosaic[call] / triton[call])
    return dict(sorted(found.items()))


seen = {"forward": ratios(""), "backward": ratios("_vjp")}
for name, by_width in seen.items():
    print(f"{name}, {sum(map(len, by_width.values()))} calls: Mosaic's time over Triton's, least, median and most")
    for (queries, values), found in by_width.items():
        shown = " ".join(f"{value:.2f}" for value in (min(found), statistics.median(found), max(found)))
        print(f"  head dimension {queries}, of values {values}: {len(found)} calls, {shown}")
forward, backward = seen.values()
assert sum(map(len, forward.values())) == 204 and sum(map(len, backward.values())) == 128
assert max(map(max, forward.values())) < 1
slower = {(16, 16), (32, 32), (256, 256)}
for widths, found in backward.items():
    assert min(found) > 1 if widths in slower else max(found) < 1, (widths, found)
assert sum(len(backward[widths]) for widths in slower) == 76
assert round(max(forward[256, 256]), 2) == 0.62 and round(max(backward[256, 256]), 2) == 1.35
assert statistics.median(forward[256, 256]) == min(map(statistics.median, forward.values()))
print("tokamax 0.0.17")
PY
