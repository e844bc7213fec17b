"""Loss, one training step, and the loop around it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import jax
import numpy as np
import optax
from flax import nnx

from lm.data import Text, batches, evaluation_batch
from lm.mesh import ROWS, cut, shared_out
from lm.model import Decoder
from lm.settings import TrainingSettings


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What one step tells: losses in nats per byte; `held_out` only where it was measured."""

    step: int
    loss: float | None
    held_out: float | None
    tokens_per_second: float | None


def loss_of(model: Decoder, windows: jax.Array) -> jax.Array:
    """Mean cross entropy of the next byte, in nats."""
    inputs, targets = shared_out(windows[:, :-1]), shared_out(windows[:, 1:])
    with cut(ROWS):
        logits, _ = model(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


loss_and_gradient = nnx.value_and_grad(loss_of)


@nnx.jit
def train_step(model: Decoder, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
    """Updates the model; returns the loss before."""
    loss, gradient = loss_and_gradient(model, windows)
    optimizer.update(model, gradient)
    return loss


def train(model: Decoder, text: Text, training: TrainingSettings) -> Iterator[Metrics]:
    """Trains, yielding the held-out loss first and then every step."""
    optimizer = nnx.Optimizer(model, _optimizer(training), wrt=nnx.Param)
    held_out = HeldOut(text, training)
    yield Metrics(0, None, held_out.loss(model), None)
    stream = batches(text.training, training.batch, training.seq_len, training.seed)
    for step, windows in zip(range(1, training.steps + 1), stream, strict=False):
        started = time.perf_counter()
        loss = float(train_step(model, optimizer, windows))
        speed = training.batch * training.seq_len / (time.perf_counter() - started)
        due = step % training.evaluate_every == 0 or step == training.steps
        yield Metrics(step, loss, held_out.loss(model) if due else None, speed)


class HeldOut:
    """The loss on text the model is not trained on, a batch at a time."""

    def __init__(self, text: Text, training: TrainingSettings) -> None:
        windows = evaluation_batch(text.held_out, training.evaluation_windows, training.seq_len)
        self.parts = [windows[at : at + training.batch] for at in range(0, len(windows), training.batch)]
        self.measure = nnx.jit(loss_of)

    def loss(self, model: Decoder) -> float:
        """Returns nats per byte."""
        losses = [float(self.measure(model, part)) for part in self.parts]
        return float(np.average(losses, weights=[len(part) for part in self.parts]))


def _optimizer(training: TrainingSettings) -> optax.GradientTransformation:
    warmup = min(training.warmup, training.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, warmup, training.steps, 0.1 * training.learning_rate
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
