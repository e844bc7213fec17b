"""Builds the shipped policy, core/src/kernelry/policy/shipped.json, from what was recorded, predicted and published.

Run: make policy; with --check it fails where the file is not what the sources give. It prints each rule with its source
and the regret of `auto` where it decides: in the recording that it was fitted to, and in a held-out one of the device.

Measured: benchmarks/results/choosing-<kind>.json, a file for each kind of device, recorded by benchmarks/choosing.py.
Predicted: the table of kernelry-tpu-splash (benchmarks/predicted.py). Published: benchmarks/results/published-gpu.json.
What a device has no recording of is ordered by predictions, then by publications, else by hand, and says so. Held-out
recordings, choosing-<kind>-held-out.json, are compared with the policy and fit nothing.

What rules look at is written here; the lengths and orders follow from the times, as benchmarks/fitting.py says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fitting
import predicted
import published
from choosing import Case, Recording, chosen, regret
from fitting import Order, Row

from kernelry.plugin import Mode
from kernelry.policy.policy import Policy
from kernelry.policy.rules import Rule, first_match
from kernelry.policy.shipped import Threshold, condition, shipped_rules, shipped_thresholds
from kernelry_tpu_splash.predictions import source as predicted_by

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHIPPED = ROOT / "core" / "src" / "kernelry" / "policy" / "shipped.json"
HELD_OUT = "-held-out"
NUMBERS = {1: "one", 2: "two", 4: "four", 8: "eight", 16: "sixteen"}

PLAIN: Order = ("dot_product",)
TILES: Order = ("blockwise", *PLAIN)
SPLASH: Order = ("splash", "tokamax_splash")
GPU: Order = ("cudnn_jax", "pallas_flash", "pallas_mha", "tokamax_mosaic", "cudnn_te")
"""The order on GPUs where nothing else is known: the vendor's library, then what serves most."""

CPU_GROUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("decode_grouped", {"mode": ["decode"], "groups": ">=2"}),
    ("decode", {"mode": ["decode"]}),
    ("prefill", {"mode": ["prefill"]}),
    ("train_segments", {"mode": ["train"], "mask": ["segments"]}),
    ("train_full", {"mode": ["train"], "mask": ["full"]}),
    ("train_head_dim_128", {"mode": ["train"], "head_dim": ">=128"}),
    ("train", {"mode": ["train"]}),
)
"""What the lengths on a CPU depend on; of two that hold the first counts."""

ACCELERATOR_GROUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("prefill_segments", {"mode": ["prefill"], "mask": ["segments"]}),
    ("prefill_window", {"mode": ["prefill"], "mask": ["window"]}),
    ("prefill", {"mode": ["prefill"]}),
    ("train_segments", {"mode": ["train"], "mask": ["segments"]}),
    ("train_window", {"mode": ["train"], "mask": ["window"]}),
    ("train", {"mode": ["train"]}),
)


@dataclasses.dataclass
class Draft:
    """The file as it grows; rules that come first decide first."""

    sources: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    thresholds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rules: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def threshold(self, name: str, value: int, unit: str, reason: str, source: str) -> None:
        self.thresholds.append({"name": name, "value": value, "unit": unit, "reason": reason, "source": source})

    def rule(self, when: Mapping[str, Any], use: Order, source: str, **why: str) -> None:
        """`why` is a reason, or the threshold that it `follows`."""
        self.rules.append({"when": dict(when), "use": list(use), "source": source, **why})

    def long_and_short(self, when: Mapping[str, Any], use: Order, source: str, **why: str) -> None:
        """With `blockwise` before `dot_product` where dense logits would take too much memory."""
        bounds = [when["kv_len"]] if "kv_len" in when else []
        tiles = tuple(name for name in TILES if name not in use)
        self.rule({**when, "kv_len": ", ".join((*bounds, ">=blockwise_min_kv_len"))}, (*use, *tiles), source, **why)
        self.rule(when, (*use, *PLAIN), source, **why)

    @property
    def named(self) -> dict[str, Threshold]:
        return {each.name: each for each in shipped_thresholds({"thresholds": self.thresholds})}

    def left(self, recording: Recording, when: Mapping[str, Any]) -> list[Row]:
        """What was recorded of the calls that these conditions and no earlier rule take."""
        rules, wanted = shipped_rules(self.named, {"rules": self.rules}), condition(when, self.named)
        found = []
        for case, told in recording.times.items():
            asked = case.request(recording.target)
            if wanted.matches(asked) and first_match(rules, asked) is None:
                found.append((asked.kv_len, {name: each["ms"][1] for name, each in told.items()}))
        return found


def built(results: Path = RESULTS) -> dict[str, Any]:
    """The shipped policy from the recordings of a folder, and from what is predicted and published."""
    draft, recordings = Draft(), _recordings(results)
    _judged(draft)
    if "cpu" in recordings:
        _cpu(draft, recordings["cpu"])
    accelerators = [recording for name, recording in sorted(recordings.items()) if name != "cpu"]
    for recording in accelerators:
        _source_of(draft, recording)
        _accelerator(draft, recording, [("decode", {"mode": ["decode"]})])
    _decode(draft)
    draft.rule({"q_len": "<flash_min_q_len"}, PLAIN, "maxtext", follows="flash_min_q_len")
    for recording in accelerators:
        _accelerator(draft, recording, ACCELERATOR_GROUPS)
    _tpu(draft)
    _gpu(draft)
    draft.rule({}, PLAIN, "judgement", reason="the kernel for every platform")
    about = "written by make policy from the sources below; change benchmarks/policy.py or a source instead"
    return {"about": about, **dataclasses.asdict(draft)}


def _recordings(results: Path, ending: str = "") -> dict[str, Recording]:
    """By kind of device."""
    paths = sorted(results.glob(f"choosing-*{ending}.json"))
    found = {path.stem.removeprefix("choosing-"): path for path in paths}
    if not ending:
        found = {name: path for name, path in found.items() if not name.endswith(HELD_OUT)}
    return {name.removesuffix(ending): Recording(path) for name, path in found.items()}


def _judged(draft: Draft) -> None:
    """Numbers that no recording gives."""
    published_in = f"tokamax {published.RELEASE}"
    draft.sources |= {
        "judgement": {"kind": "not measured"},
        "maxtext": {"kind": "published", "by": "MaxText 0.2.5"},
        "tokamax": {"kind": "published", "by": published_in, "file": "benchmarks/results/published-gpu.json"},
        "ragged": {"kind": "predicted", "by": predicted.compiler(), "file": "tests/aot/test_tpu_ragged_speed.py"},
        "splash": {"kind": "predicted", "by": predicted.compiler(), "file": predicted.FILE},
    }
    since = "MaxText 0.2.5: dot_product below 128 query tokens, flash from there on"
    draft.threshold("flash_min_q_len", 128, "query tokens", since, "maxtext")
    memory = "dense float32 logits of 8 heads take 2 GiB from there on"
    unit = "key tokens, on accelerators where no kernel of their own serves"
    draft.threshold("blockwise_min_kv_len", 8192, unit, memory, "judgement")
    ratio = published.dense_over_triton(16384, 128)
    times = f"Triton is {ratio:.1f} times as fast as XLA's dense attention (head dim 128, S = 16384)"
    unit, slower = "percent of the call's own multiplications", f"tokamax's shipped H100 timings: {times}"
    draft.threshold("adapters_max_extra_work", 100 * int(ratio - 1), unit, slower, "tokamax")


def _source_of(draft: Draft, recording: Recording) -> str:
    """Where, when and with what it was recorded; returns the reason that rules give."""
    facts, target = recording.recorded, recording.target
    name = f"choosing-{target.kind or target.platform}"
    draft.sources[name] = {
        "kind": "measured",
        "by": "benchmarks/choosing.py",
        "file": f"benchmarks/results/{name}.json",
        **{key: facts[key] for key in ("date", "versions")},
        "device": f"{facts['cores']} cores, {facts['cpu']['model']}" if target.platform == "cpu" else facts["device"],
    }
    cores = f"{NUMBERS.get(facts['cores'], facts['cores'])} CPU cores"
    where = cores if target.platform == "cpu" else f"a device of kind {target.kind}"
    return f"measured by benchmarks/choosing.py on {where}"


def _cpu(draft: Draft, recording: Recording) -> None:
    reason = _source_of(draft, recording)
    for name, group in CPU_GROUPS:
        when = {"platform": ["cpu"], **group}
        split = fitting.crossing(draft.left(recording, when), PLAIN, TILES)
        least = f"cpu_blockwise_min_{name}_kv_len"
        draft.threshold(least, split.least, "key tokens", reason, "choosing-cpu")
        draft.rule({**when, "kv_len": f">={least}"}, TILES, "choosing-cpu", follows=least)
        draft.rule(when, PLAIN, "choosing-cpu", follows=least)


def _accelerator(draft: Draft, recording: Recording, groups: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """The orders of a recorded kind, with a length between two of them where the times ask for it."""
    target = recording.target
    name, reason = f"choosing-{target.kind}", _source_of(draft, recording)
    preferred = GPU if target.platform == "gpu" else SPLASH
    for group, conditions in groups:
        when = {"platform": [target.platform], "kind": [target.kind], **conditions}
        rows = draft.left(recording, when)
        if not rows:
            continue
        split = fitting.measured_orders(rows, (*preferred, *TILES))
        if split.least:
            least = f"{target.kind}_{split.above[0]}_min_{group}_kv_len"
            draft.threshold(least, split.least, "key tokens", reason, name)
            _ordered(draft, {**when, "kv_len": f">={least}"}, split.above, name, follows=least)
            _ordered(draft, when, split.below, name, follows=least)
        else:
            _ordered(draft, when, split.above, name, reason=reason)


def _ordered(draft: Draft, when: dict[str, Any], order: Order, source: str, **why: str) -> None:
    """A measured order; where `dot_product` is a fallback, as everywhere not for dense logits that are too large."""
    before = tuple(name for name in order if name not in PLAIN)
    if before and when["mode"] != ["decode"]:
        draft.long_and_short(when, before, source, **why)
    else:
        draft.rule(when, (*before, *PLAIN), source, **why)


def _decode(draft: Draft) -> None:
    kinds = ", ".join(predicted.KINDS)
    fewer = f"on {kinds} ragged takes fewer cycles than its copies of separate keys and values"
    draft.rule(
        {"platform": ["tpu"], "mode": ["decode"]}, ("ragged", *PLAIN), "ragged", reason=f"{predicted_by()}: {fewer}"
    )
    parts = "not measured: pallas_decode fetches the keys of a row in parts, and only those that it sees"
    draft.rule({"platform": ["gpu"], "mode": ["decode"]}, ("pallas_decode", *PLAIN), "judgement", reason=parts)
    draft.rule({"mode": ["decode"]}, PLAIN, "judgement", reason="not measured: a decode step has few logits")


def _tpu(draft: Draft) -> None:
    prefill: dict[str, Any] = {
        "platform": ["tpu"],
        "kind": list(predicted.KINDS),
        "mode": ["prefill"],
        "dtype": ["bfloat16"],
    }
    train = {**prefill, "mode": ["train"]}
    every, dense = ("causal", "full", "window"), ("causal", "full")

    order = fitting.ranking(predicted.rows(Mode.PREFILL, every), SPLASH)
    reason = f"{predicted_by()}: tokamax_splash takes {_span(Mode.PREFILL, every)} of splash's cycles"
    draft.long_and_short(prefill, order, "splash", reason=reason)

    order = fitting.ranking(predicted.rows(Mode.TRAIN, ("window",)), SPLASH)
    takes = f"with a window, forward and backward, tokamax_splash takes {_span(Mode.TRAIN, ('window',))}"
    reason = f"{predicted_by()}: {takes} of splash's cycles"
    draft.long_and_short({**train, "mask": ["window"]}, order, "splash", reason=reason)

    split = fitting.crossing(predicted.rows(Mode.TRAIN, dense), SPLASH, SPLASH[::-1])
    long = _span(Mode.TRAIN, dense, [each for each in predicted.LENGTHS if each >= split.least])
    short = _span(Mode.TRAIN, dense, [each for each in predicted.LENGTHS if each < split.least])
    takes = (
        f"tokamax_splash takes {long} of splash's cycles with {split.least} key tokens and more, and {short} with fewer"
    )
    unit, least = "key tokens, in training on TPUs whose schedules are known", "tokamax_splash_min_train_kv_len"
    draft.threshold(least, split.least, unit, f"{predicted_by()}: forward and backward, {takes}", "splash")
    draft.long_and_short({**train, "kv_len": f">={least}"}, split.above, "splash", follows=least)
    draft.long_and_short(train, split.below, "splash", follows=least)

    unknown = "not measured, and not predicted for this kind or dtype: what needs no further package comes first"
    draft.long_and_short({"platform": ["tpu"]}, SPLASH, "judgement", reason=unknown)


def _span(mode: Mode, names: Sequence[str], lengths: Sequence[int] = predicted.LENGTHS) -> str:
    found = list(predicted.shares(mode, names, lengths))
    return f"{min(found):.2f} to {max(found):.2f}"


def _gpu(draft: Draft) -> None:
    """Forward passes as published; of the backward pass of most kernels nothing is."""
    held = published.read()
    hopper, ampere = held["h100"], held["a100"]
    mosaic = f"cuDNN takes {published.ratio(hopper, 'cudnn', 'mosaic'):.2f} of Mosaic's time"
    triton = f"which takes {published.ratio(hopper, 'mosaic', 'triton'):.2f} of that of tokamax's Triton kernel"
    cudnn = published.ratio(ampere, "cudnn", "triton")
    texts = {
        "h100": f"{mosaic}, {triton}",
        "a100": f"cuDNN takes {cudnn:.2f} of the time of tokamax's Triton kernel",
    }
    for kind, text in texts.items():
        by = f"published with tokamax {published.RELEASE}, forward on an {kind.upper()}"
        when = {"platform": ["gpu"], "kind": [kind], "mode": ["prefill"]}
        order, reason = published.order(held[kind], GPU), f"{by}: {text}; the others are not measured"
        draft.long_and_short(when, order, "tokamax", reason=reason)
    unknown = "not measured: the vendor's library, then what serves most"
    draft.long_and_short({"platform": ["gpu"]}, GPU, "judgement", reason=unknown)


def text_of(data: Mapping[str, Any]) -> str:
    """A line for each threshold and rule, so that a change of one shows as one."""

    def lines(rows: Sequence[Any]) -> str:
        return "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows) + "\n ]"

    sources = ",\n  ".join(
        f"{json.dumps(name)}: {json.dumps(source, sort_keys=True)}" for name, source in sorted(data["sources"].items())
    )
    parts = {
        "about": json.dumps(data["about"]),
        "sources": f"{{\n  {sources}\n }}",
        "thresholds": lines(sorted(data["thresholds"], key=lambda row: row["name"])),
        "rules": lines(data["rules"]),
    }
    return "{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}\n"


@dataclasses.dataclass(frozen=True)
class Regret:
    """The case, the kernel that the policy chooses for it, the rule that decides, and what is lost."""

    case: Case
    kernel: str
    rule: Rule
    lost: float


def regrets(data: Mapping[str, Any], recording: Recording) -> Iterator[Regret]:
    """What `auto` loses in each case of a recording under a policy."""
    policy = policy_of(data)
    for case, told in recording.times.items():
        asked = case.request(recording.target)
        rule = first_match(policy.defaults, asked)
        assert rule is not None  # the last rule always applies
        kernel = chosen(asked, policy)
        yield Regret(case, kernel, rule, regret(told, kernel))


def policy_of(data: Mapping[str, Any]) -> Policy:
    thresholds = shipped_thresholds(data)
    rules = shipped_rules({each.name: each for each in thresholds}, data)
    return Policy(defaults=rules, thresholds=thresholds)


def show(data: Mapping[str, Any], results: Path) -> None:
    """Prints each rule with its source and the regret in both recordings."""
    fitted, held = ([*_recordings(results, ending).values()] for ending in ("", HELD_OUT))
    found = [[each for recording in some for each in regrets(data, recording)] for some in (fitted, held)]
    named = {each.name: each for each in shipped_thresholds(data)}
    sources = {condition(row["when"], named): row["source"] for row in reversed(data["rules"])}
    print("The rules in their order; the regret of auto where each decides: mean, worst (calls).")
    print(_line("", "recording", "held out"))
    for rule in policy_of(data).defaults:
        source = data["sources"][sources[rule.when]]
        told = f"{source['kind']} by {source['by']}" if "by" in source else source["kind"]
        print(f"{rule.when!s}: {', '.join(rule.names)}")
        print(_line(f"    {told}", *(_cell([each.lost for each in some if each.rule == rule]) for some in found)))
    print(_line("all", *(_cell([each.lost for each in some]) for some in found)))


def _line(told: str, *cells: str) -> str:
    return f"{told:<42}{cells[0]:<20}{cells[1]}"


def _cell(lost: Sequence[float]) -> str:
    return f"{fitting.mean(lost):.3f} {max(lost):.2f} ({len(lost)})" if lost else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is another")
    asked = parser.parse_args()
    data = built()
    show(data, RESULTS)
    if asked.check and SHIPPED.read_text(encoding="utf-8") != text_of(data):
        raise SystemExit(f"{SHIPPED} is not what the recordings give: run make policy and commit the file.")
    if not asked.check:
        SHIPPED.write_text(text_of(data), encoding="utf-8")


if __name__ == "__main__":
    main()
