"""What a run leaves behind: metrics.jsonl, resolutions.json, loss.png."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib
import numpy as np

from lm.choices import Choice
from lm.settings import Settings
from lm.train import Metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_TRAIN, _SMOOTH, _HELD_OUT = "#9db7d5", "#3b6ea5", "#c8443c"
_SMOOTHING = 11  # steps


def write_resolutions(path: Path, made: list[Choice]) -> None:
    """Writes every resolution with its candidates and their reasons."""
    path.write_text(json.dumps([choice.to_json() for choice in made], indent=2) + "\n", encoding="utf-8")


def write_metrics(path: Path, history: list[Metrics]) -> None:
    """Writes one JSON object per step."""
    lines = (json.dumps(dataclasses.asdict(metrics)) for metrics in history)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot_losses(path: Path, history: list[Metrics], settings: Settings, made: list[Choice], size: int) -> None:
    """Draws the training and the held-out loss over the bytes seen."""
    per_step = settings.training.batch * settings.training.seq_len / 1e6
    steps = np.array([m.step for m in history if m.loss is not None])
    losses = np.array([m.loss for m in history if m.loss is not None])
    held_out = np.array([(m.step, m.held_out) for m in history if m.held_out is not None])
    smooth = _centred_mean(losses, _SMOOTHING)

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    axes.plot(steps * per_step, losses, color=_TRAIN, alpha=0.45, linewidth=0.8)
    axes.plot(steps * per_step, smooth, color=_SMOOTH, label=f"training, mean of {_SMOOTHING} steps")
    axes.plot(held_out[:, 0] * per_step, held_out[:, 1], "o-", color=_HELD_OUT, markersize=4, label="held-out text")
    axes.annotate(
        f"{held_out[-1, 1]:.2f} nats",
        (held_out[-1, 0] * per_step, held_out[-1, 1]),
        xytext=(4, 10),
        textcoords="offset points",
        ha="right",
        color=_HELD_OUT,
        fontweight="bold",
    )
    uniform = np.log(256)
    axes.axhline(uniform, color="grey", linestyle=":", linewidth=1)
    axes.text(per_step * steps[-1], uniform + 0.04, "uniform over 256 bytes", color="grey", ha="right", va="bottom")
    axes.set(
        xlabel="bytes trained on (millions)",
        ylabel="cross entropy (nats per byte)",
        ylim=(0, uniform + 0.5),
        xlim=(-0.01 * per_step * steps[-1], 1.02 * per_step * steps[-1]),
    )
    figure.suptitle(f"“{settings.name}”: {size / 1e6:.2f} M parameters, {len(settings.model.layers)} layers", x=0.5)
    axes.set_title(_kernels(made), fontsize=10, color="#444444")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _centred_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean; at the ends over the values there are."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")


def _kernels(made: list[Choice]) -> str:
    trained = (choice for choice in made if choice.phase == "train")
    return "trained with " + ", ".join(f"{choice.resolution.kernel} ({choice.kind})" for choice in trained)
