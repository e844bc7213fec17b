"""Kernels that lie, one way each. The conformance kit must catch every one.

Each is an honest kernel with one step overridden; `Mutant.case` is a case of the kit that catches it.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from honest_kernels import ALL, BACKWARD, HONEST, HONEST_BACKWARD, Honest, HonestBackward, spec_of

import kernelry
from kernelry.masks import Chunked, Lengths, Segments, SlidingWindow
from kernelry.masks.band import Band
from kernelry.masks.base import At
from kernelry.plugin import KernelSpec, QuantizedArray, Refusal, RefusalCode, Side


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A lie, and a case of the kit that catches it."""

    spec: KernelSpec
    case: str


MUTANTS: list[Mutant] = []


def lie(case, *, backward=False, **changes):
    """Registers a class as the body of a mutant."""

    def register(body):
        name = body.__name__.lower()
        spec = spec_of(body, name, BACKWARD if backward else ALL)
        MUTANTS.append(Mutant(dataclasses.replace(spec, **changes), case))
        return body

    return register


def changed(mask, change):
    """Applies a change to the mask inside `.at`."""
    return At(changed(mask.mask, change), mask.query, mask.kv) if isinstance(mask, At) else change(mask)


class OtherMasks(Honest):
    """Evaluates other masks than it was given."""

    def masks(self, inputs):
        return tuple(changed(mask, self.other) for mask in inputs.mask)


@lie("soft cap")
class IgnoresSoftCap(Honest):
    def capped(self, logits, inputs, visible, request):
        return logits


@lie("every feature at once")
class CapsBeforeBias(Honest):
    def logits(self, query, key, request):
        logits = super().logits(query, key, request)
        return logits if request.soft_cap is None else request.soft_cap * jnp.tanh(logits / request.soft_cap)

    def capped(self, logits, inputs, visible, request):
        return logits


def band(mask, left, right):
    if not isinstance(mask, Band) or mask.left is None:
        return mask
    return Band(mask.left + left, None if mask.right is None else mask.right + right)


@lie("window")
class WindowOffByOneAtTheLeft(OtherMasks):
    def other(self, mask):
        return band(mask, -1, 0)


@lie("window")
class WindowOffByOneAtTheRight(OtherMasks):
    def other(self, mask):
        return band(mask, 0, 1)


@lie("segments")
class IgnoresSegments(Honest):
    def masks(self, inputs):
        return tuple(mask for mask in inputs.mask if not isinstance(mask, Segments))


@lie("segments")
class MatchesNegativeSegments(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, Segments):
            return mask
        kv_ids = None if mask.kv_ids is None else jnp.where(jnp.asarray(mask.kv_ids) < 0, 99, mask.kv_ids)
        return Segments(jnp.where(jnp.asarray(mask.query_ids) < 0, 99, mask.query_ids), kv_ids)


@lie("bias")
class DropsBias(Honest):
    def biased(self, logits, inputs):
        return logits


@lie("bias")
class DropsBiasGradient(Honest):
    def biased(self, logits, inputs):
        return logits if inputs.bias is None else logits + jax.lax.stop_gradient(inputs.bias)


@lie("sinks")
class CountsSinksTwice(Honest):
    def sinks(self, inputs):
        return super().sinks(inputs) + jnp.log(2.0)


@lie("sinks")
class ScalesSinks(Honest):
    def with_sinks(self, out, lse, inputs):
        if inputs.sinks is None:
            return out
        return super().with_sinks(out, lse, dataclasses.replace(inputs, sinks=inputs.sinks * 0.35))


@lie("lse")
class LseWithoutScale(Honest):
    def lse(self, lse, empty, request):
        return super().lse(lse / self.scale(request), empty, request)


@lie("lse")
class LseInBaseTwo(Honest):
    def returned_lse(self, lse):
        return lse / jnp.log(2.0)


@lie("lse")
class ClaimsAStatisticItDoesNotReturn(Honest):
    def returned_lse(self, lse):
        return None


@lie("lse")
class LseWithoutGradient(Honest):
    def returned_lse(self, lse):
        return jax.lax.stop_gradient(lse)


@lie("empty rows")
class LseOfEmptyRowsIsZero(Honest):
    def returned_lse(self, lse):
        return jnp.where(jnp.isneginf(lse), 0, lse)


@lie("max logits")
class MaxOfUnmaskedLogits(Honest):
    def max_logits(self, masked, capped):
        return capped.max(axis=(2, 3), initial=-jnp.inf)


@lie("empty rows")
class MeanOfValuesInEmptyRows(Honest):
    def output(self, probabilities, value, empty):
        out = super().output(probabilities, value, empty)
        mean = value.astype(jnp.float32).mean(axis=1, keepdims=True)
        return jnp.where(empty.swapaxes(1, 2)[..., None], mean, out)


@lie("NaN in hidden slots")
class LeaksHiddenNan(Honest):
    def cleaned(self, inputs, visible, request):
        return inputs.query, inputs.key, inputs.value


@lie("full attention")
class GroupsHeadsWrongly(Honest):
    def expanded(self, array, request):
        return jnp.tile(array, (1, 1, request.groups, 1))


@lie("dropout")
class DropsWithAFixedKey(Honest):
    def dropout_key(self, inputs):
        return jax.random.key(0)


@lie("dropout")
class DropsWithoutRescaling(Honest):
    def kept_share(self, request):
        return 1


@lie("dropout")
class IgnoresDropout(Honest):
    def dropped(self, probabilities, inputs, request):
        return probabilities


@lie("lse", backward=True)
class WrongGradientOfKeys(HonestBackward):
    def d_key(self, d_key):
        return d_key * 1.01


@lie("lse", backward=True)
class DropsTheCotangentOfLse(HonestBackward):
    def delta(self, out, d_out, d_lse):
        return super().delta(out, d_out, None)


@lie("through adapters: sinks", backward=True)
class DifferentiatesAsIfItWereTheWhole(HonestBackward):
    def backward(self, inputs, request, tiling, out, lse, d_out, d_lse):
        mine = self.attend(inputs, request, True)
        mine_lse = jnp.where(jnp.isneginf(mine.lse), jnp.inf, mine.lse)
        return super().backward(inputs, request, tiling, mine.out, mine_lse, d_out, d_lse)


@lie("query offset")
class IgnoresQueryOffset(Honest):
    def masks(self, inputs):
        return tuple(At(mask.mask, None, mask.kv) if isinstance(mask, At) else mask for mask in inputs.mask)


@lie("offset")
class IgnoresKeyOffset(Honest):
    def masks(self, inputs):
        return tuple(At(mask.mask, mask.query, None) if isinstance(mask, At) else mask for mask in inputs.mask)


@lie("traced positions")
class IgnoresTracedPositions(Honest):
    def masks(self, inputs):
        traced = [isinstance(mask, At) and bool(jax.tree.leaves((mask.query, mask.kv))) for mask in inputs.mask]
        return tuple(mask.mask if skip else mask for mask, skip in zip(inputs.mask, traced, strict=True))


@lie("lengths")
class UsesTheFirstRowsLengths(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, Lengths) or jnp.ndim(mask.kv_lengths) == 0:
            return mask
        return Lengths(jnp.broadcast_to(mask.kv_lengths[:1], jnp.shape(mask.kv_lengths)), mask.query_lengths)


@lie("max logits where nothing is visible")
class IgnoresQueryLengths(OtherMasks):
    def other(self, mask):
        return Lengths(mask.kv_lengths) if isinstance(mask, Lengths) else mask


@lie("D = ")
class ScalesByTheValueDim(Honest):
    def scale(self, request):
        return request.value_dim**-0.5 if request.scale == request.default_scale else request.scale


@lie("full attention")
class IgnoresScale(Honest):
    def scale(self, request):
        return request.default_scale


@lie("bfloat16")
class ReturnsFloat32(Honest):
    def forward(self, inputs, request, tiling, *, statistics):
        partial = super().forward(inputs, request, tiling, statistics=statistics)
        return dataclasses.replace(partial, out=partial.out.astype(jnp.float32), dtype="float32")


_calls = itertools.count()


@lie("determinism")
class AnswersDifferentlyEachTime(Honest):
    def output(self, probabilities, value, empty):
        noise = jax.pure_callback(lambda: jnp.float32(next(_calls)), jax.ShapeDtypeStruct((), jnp.float32))
        return super().output(probabilities, value, empty) * (1 + 1e-7 * noise)


@lie("full attention")
class DelegatesToAnotherKernel(Honest):
    def forward(self, inputs, request, tiling, *, statistics):
        other = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
        return other.body().forward(inputs, request, tiling, statistics=statistics)


@lie("full attention")
class DropsTheGradientOfTheQuery(Honest):
    def attend(self, inputs, request, statistics):
        stopped = dataclasses.replace(inputs, query=jax.lax.stop_gradient(inputs.query))
        return super().attend(stopped, request, statistics)


@lie("chunked")
class TakesChunksForWindows(OtherMasks):
    def other(self, mask):
        return SlidingWindow(mask.size - 1) if isinstance(mask, Chunked) else mask


@lie("selection")
class ReadsTheFirstHeadsMask(Honest):
    def sides(self, request):
        return Side.query(request.q_len, q_heads=request.q_heads), Side.kv(request.kv_len)

    def visible(self, inputs, request):
        visible = super().visible(inputs, request)
        return visible[:, :1]


@lie("quantised keys")
class ForgetsTheScale(Honest):
    def scaled(self, array):
        return array.values.astype(jnp.float32) if isinstance(array, QuantizedArray) else array


@lie("quantised keys: int8:head_dim")
class TakesTheFirstHeadsScale(Honest):
    def scale_of(self, array):
        return array.scale[..., :1, :]


@lie("quantised keys")
class ScalesValuesAsKeys(Honest):
    def read(self, inputs):
        read = super().read(inputs)
        if not isinstance(inputs.value, QuantizedArray):
            return read
        return dataclasses.replace(read, value=self.scaled(QuantizedArray(inputs.value.values, inputs.key.scale)))


@lie("NaN in hidden slots: int8")
class LeaksTheScaleOfHiddenSlots(Honest):
    def cleaned(self, inputs, visible, request):
        query, key, value = super().cleaned(inputs, visible, request)
        return query, key, inputs.value if request.kv_quantization else value


@lie("pages")
class IgnoresTheOrderOfPages(Honest):
    def order(self, table):
        return 1 + jnp.arange(table.size).reshape(table.shape)


@lie("pages")
class ReadsTheFirstRowsPages(Honest):
    def order(self, table):
        return jnp.broadcast_to(super().order(table)[:1], table.shape)


@lie("NaN in hidden slots: pages")
class ReadsAbsentPages(Honest):
    def cleaned(self, inputs, visible, request):
        query, key, value = super().cleaned(inputs, visible, request)
        return query, key, value if request.page_size is None else inputs.value


def _refuse_all(request, environment):
    return (Refusal(RefusalCode.DRIVER, "not today"),)


@lie("serves a plain call", refusals=_refuse_all)
class RefusesEverything(Honest):
    pass


def _tolerate(capabilities):
    wide = tuple(dataclasses.replace(tolerance, forward=1.0, gradient=1.0) for tolerance in capabilities.tolerances)
    return dataclasses.replace(capabilities, tolerances=wide)


MUTANTS.append(
    Mutant(
        dataclasses.replace(HONEST, name="tolerates_anything", capabilities=_tolerate(ALL)),
        "a sane tolerance for float32",
    )
)
MUTANTS.append(Mutant(dataclasses.replace(HONEST, name="unsigned", signature=lambda _: ()), "a signature"))

HONEST_KERNELS = (HONEST, HONEST_BACKWARD)
