"""Kernels that lie, one way each. The conformance kit must catch every one.

Each is an honest kernel with one step overridden; `Mutant.case` is a case of the kit that catches it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from honest_kernels import ALL, BACKWARD, HONEST, HONEST_BACKWARD, Honest, HonestBackward, spec_of

import kernelry
from kernelry.masks import (
    BidirectionalSpans,
    BlockCausal,
    BlockSelection,
    Causal,
    Chunked,
    Dense,
    Full,
    Lengths,
    Predicate,
    PrefixLM,
    Segments,
    SlidingWindow,
)
from kernelry.masks.band import Band
from kernelry.masks.composition import And, At, Not, Or
from kernelry.masks.positions import StaticOffset, StaticPositions
from kernelry.plugin import KernelSpec, QuantizedArray, Refusal, RefusalCode, Side, Tiling
from kernelry.testing.conformance.samples import Near, Strided


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


def inside(mask):
    """The mask inside `.at`."""
    return mask.mask if isinstance(mask, At) else mask


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


@lie("a bias after the soft cap")
class IgnoresThatTheBiasComesAfterTheCap(Honest):
    def adds_after_cap(self, request):
        return False


@lie("a bias after the soft cap")
class TakesTheSlopeOfTheCapForABiasAfterIt(Honest):
    def biased_after_cap(self, capped, inputs, request):
        bias = inputs.bias.astype(jnp.float32)
        constant = jax.lax.stop_gradient(bias)
        slope = 1 - jax.lax.stop_gradient(capped / request.soft_cap) ** 2
        return capped + constant + slope * (bias - constant)


@lie("lse of a bias after the soft cap")
class ReturnsCappedLseUnderABiasAfterTheCap(Honest):
    def biased_after_cap(self, capped, inputs, request):
        self.before = jax.nn.logsumexp(capped, axis=3)
        return super().biased_after_cap(capped, inputs, request)

    def attend(self, inputs, request, statistics):
        self.before = None
        return super().attend(inputs, request, statistics)

    def returned_lse(self, lse):
        return lse if self.before is None else jnp.where(jnp.isneginf(lse), lse, self.before)


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


@lie("custom")
class IgnoresCustomMasks(Honest):
    def masks(self, inputs):
        return tuple(mask for mask in inputs.mask if not isinstance(inside(mask), Near))


@lie("custom")
class ReadsOneRowOfACustomMasksArrays(OtherMasks):
    def other(self, mask):
        return Near(mask.reach[:1]) if isinstance(mask, Near) else mask


@lie("custom mask without arrays")
class KnowsPredicatesByTheirClassAlone(Honest):
    def masks(self, inputs):
        return tuple(mask for mask in inputs.mask if not isinstance(inside(mask), Strided))


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


@dataclasses.dataclass(frozen=True)
class Instead:
    """A mask that answers another question about its sides."""

    answer: Callable[..., object]

    def evaluate(self, query, kv):
        return self.answer(query, kv)


@lie("beyond its tiles")
class NeverReadsTheLastKeysOfALongRow(Honest):
    def visible(self, inputs, request):
        whole = request.kv_len - request.kv_len % 128 or request.kv_len
        return super().visible(inputs, request) & (jnp.arange(request.kv_len) < whole)


@lie("beyond its tiles", tilings=lambda _: (Tiling.of(keys_at_once=192),))
class ReadsWholeTilesOfItsOwnOnly(Honest):
    def visible(self, inputs, request):
        whole = request.kv_len - request.kv_len % 192 or request.kv_len
        return super().visible(inputs, request) & (jnp.arange(request.kv_len) < whole)


@lie("beyond its tiles")
class ForgetsTheLastBlockOfQueries(Honest):
    def output(self, probabilities, value, empty):
        out = super().output(probabilities, value, empty)
        whole = out.shape[1] - out.shape[1] % 128 or out.shape[1]
        return jnp.where((jnp.arange(out.shape[1]) < whole)[:, None, None], out, 0)


def maxima_by_block(masked, size=128):
    """The running maximum as each block of keys knew it, for every key."""
    running = jax.lax.cummax(jax.lax.stop_gradient(masked), axis=3)
    last = jnp.minimum(jnp.arange(masked.shape[3]) // size * size + size, masked.shape[3]) - 1
    return jnp.maximum(running[..., last], jnp.finfo(jnp.float32).min)


@lie("beyond its tiles")
class DoesNotRescaleWhenALaterBlockHasALargerMaximum(Honest):
    def weights(self, masked, top):
        return jnp.exp(masked - maxima_by_block(masked))


@lie("beyond its tiles")
class StartsEachBlockOfQueriesAtTheDiagonal(Honest):
    def masks(self, inputs):
        early = Instead(lambda query, kv: (query.slots // 128 == 0) | (kv.slots >= query.slots // 128 * 128))
        return (*super().masks(inputs), early)


def beyond(length):
    """The tokens beyond a first tile of 128."""
    return jnp.arange(length) >= 128


def repeated(mask):
    """Answers for later keys as for those of the first tile."""

    def answer(query, kv):
        visible = mask.evaluate(query, kv)
        return visible[..., jnp.arange(visible.shape[3]) % 128]

    return Instead(answer)


def instead_beyond(mask, other):
    """Answers as another mask where query or key is beyond the first tile."""
    later = lambda query, kv: (query.slots >= 128) | (kv.slots >= 128)  # noqa: E731
    return Instead(lambda query, kv: jnp.where(later(query, kv), other.evaluate(query, kv), mask.evaluate(query, kv)))


@lie("beyond its tiles, window")
class WindowsHaveNoLeftEdgeBeyondATile(OtherMasks):
    def other(self, mask):
        return instead_beyond(mask, Band(None, mask.right)) if isinstance(mask, Band) and mask.left else mask


@lie("beyond its tiles, wide window")
class VisitsTwoTilesOfAWindow(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, Band) or mask.left is None:
            return mask
        visited = Instead(lambda query, kv: kv.slots // 64 >= query.slots // 64 - 1)
        return Instead(lambda query, kv: visited.evaluate(query, kv) & mask.evaluate(query, kv))


@lie("beyond its tiles, lengths")
class CutsLengthsAtATile(OtherMasks):
    def other(self, mask):
        return Lengths(jnp.minimum(mask.kv_lengths, 128), mask.query_lengths) if isinstance(mask, Lengths) else mask


@lie("beyond its tiles, dense")
class RepeatsTheFirstTileOfADenseMask(OtherMasks):
    def other(self, mask):
        return repeated(mask) if isinstance(mask, Dense) else mask


@lie("beyond its tiles, block selection")
class RepeatsTheFirstTileOfASelection(OtherMasks):
    def other(self, mask):
        return repeated(mask) if isinstance(mask, BlockSelection) else mask


@lie("beyond its tiles, segments")
class SeesEverySegmentBeyondATile(OtherMasks):
    def other(self, mask):
        return instead_beyond(mask, Full()) if isinstance(mask, Segments) else mask


@lie("beyond its tiles, segments of two sides")
class ReadsLaterKeysSegmentsFromTheQueries(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, Segments) or mask.kv_ids is None:
            return mask
        return instead_beyond(mask, Segments(mask.query_ids))


@lie("beyond its tiles, spans")
class SpansEndWithTheirTile(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, BidirectionalSpans):
            return mask
        return Instead(lambda query, kv: (query.slots // 128 == kv.slots // 128) & mask.evaluate(query, kv))


@lie("beyond its tiles, chunked")
class ChunksEndWithTheirTile(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, Chunked):
            return mask
        return Instead(lambda query, kv: (query.slots // 128 == kv.slots // 128) & mask.evaluate(query, kv))


@lie("beyond its tiles, block causal")
class TakesBlocksForCausalBeyondATile(OtherMasks):
    def other(self, mask):
        return instead_beyond(mask, Causal()) if isinstance(mask, BlockCausal) else mask


@lie("beyond its tiles, long prefix")
class CutsPrefixesAtATile(OtherMasks):
    def other(self, mask):
        return PrefixLM(jnp.minimum(mask.prefix_lengths, 128)) if isinstance(mask, PrefixLM) else mask


@lie("beyond its tiles, predicate")
class GivesPredicatesPositionsInTheTile(OtherMasks):
    def other(self, mask):
        inside = lambda side: dataclasses.replace(side, positions=side.positions % 128)  # noqa: E731
        tiled = Instead(lambda query, kv: mask.evaluate(inside(query), inside(kv)))
        return instead_beyond(mask, tiled) if isinstance(mask, Predicate) else mask


@lie("beyond its tiles, or")
class TakesOrForAndBeyondATile(OtherMasks):
    def other(self, mask):
        return instead_beyond(mask, And(mask.parts)) if isinstance(mask, Or) else mask


@lie("beyond its tiles, not")
class ForgetsNotBeyondATile(OtherMasks):
    def other(self, mask):
        return instead_beyond(mask, mask.mask) if isinstance(mask, Not) else mask


@lie("beyond its tiles, full attention")
class VisitsNoTileRightOfTheDiagonal(Honest):
    def masks(self, inputs):
        visited = Instead(lambda query, kv: (kv.slots // 128 <= query.slots // 128) | (query.slots.size < 128))
        return (*super().masks(inputs), visited)


@lie("beyond its tiles, few queries, causal")
class ReadsOneTileInAStep(Honest):
    def visible(self, inputs, request):
        return super().visible(inputs, request) & ~(beyond(request.kv_len) & (request.q_len < 8))


def by_slot_beyond(mask):
    return instead_beyond(mask, mask.mask)


@lie("beyond its tiles, causal at offsets")
class IgnoresOffsetsBeyondATile(Honest):
    def masks(self, inputs):
        moved = [has_offsets(mask) and inputs.query.shape[1] > 128 for mask in inputs.mask]
        return tuple(by_slot_beyond(mask) if m else mask for mask, m in zip(inputs.mask, moved, strict=True))


@lie("beyond its tiles, causal at static positions")
class IgnoresStaticPositionsBeyondATile(Honest):
    def masks(self, inputs):
        static = [isinstance(mask, At) and isinstance(mask.query, StaticPositions) for mask in inputs.mask]
        return tuple(by_slot_beyond(mask) if s else mask for mask, s in zip(inputs.mask, static, strict=True))


@lie("beyond its tiles, causal at traced")
class IgnoresTracedPositionsBeyondATile(Honest):
    def masks(self, inputs):
        traced = [isinstance(mask, At) and bool(jax.tree.leaves((mask.query, mask.kv))) for mask in inputs.mask]
        return tuple(by_slot_beyond(mask) if t else mask for mask, t in zip(inputs.mask, traced, strict=True))


@lie("beyond its tiles, soft cap and bias")
class RepeatsTheFirstTileOfABias(Honest):
    def biased(self, logits, inputs):
        if inputs.bias is None or inputs.bias.shape[2] == 1:
            return super().biased(logits, inputs)
        return logits + inputs.bias.astype(jnp.float32)[:, :, jnp.arange(inputs.bias.shape[2]) % 128]


@lie("beyond its tiles, soft cap and bias")
class DropsTheBiasGradientBeyondATile(Honest):
    def biased(self, logits, inputs):
        if inputs.bias is None:
            return logits
        bias = inputs.bias.astype(jnp.float32)
        return logits + jnp.where(beyond(bias.shape[3]), jax.lax.stop_gradient(bias), bias)


@lie("beyond its tiles, bias for every key")
class SumsASharedBiasGradientOverOneTile(Honest):
    def biased(self, logits, inputs):
        if inputs.bias is None or inputs.bias.shape[2] > 1:
            return super().biased(logits, inputs)
        bias = jnp.broadcast_to(inputs.bias.astype(jnp.float32), logits.shape)
        return logits + jnp.where(beyond(bias.shape[2])[:, None], jax.lax.stop_gradient(bias), bias)


@lie("beyond its tiles, soft cap and bias")
class CapsTheFirstTileOnly(Honest):
    def capped(self, logits, inputs, visible, request):
        return jnp.where(beyond(request.kv_len), logits, super().capped(logits, inputs, visible, request))


@lie("beyond its tiles, soft cap and bias and sinks")
class AppliesSinksToTheFirstTileOnly(Honest):
    def with_sinks(self, out, lse, inputs):
        return jnp.where(beyond(out.shape[1])[:, None, None], out, super().with_sinks(out, lse, inputs))


@lie("beyond its tiles, soft cap and bias and sinks")
class SumsTheSinkGradientOverOneTile(Honest):
    def with_sinks(self, out, lse, inputs):
        if inputs.sinks is None:
            return out
        constant = dataclasses.replace(inputs, sinks=jax.lax.stop_gradient(inputs.sinks))
        first, later = (super(SumsTheSinkGradientOverOneTile, self).with_sinks(out, lse, i) for i in (inputs, constant))
        return jnp.where(beyond(out.shape[1])[:, None, None], later, first)


@lie("beyond its tiles, soft cap and bias and sinks and max logits")
class MaxLogitsOfTheFirstTile(Honest):
    def max_logits(self, masked, capped):
        return super().max_logits(jnp.where(beyond(masked.shape[3]), -jnp.inf, masked), capped)


@lie("beyond its tiles, soft cap and bias and sinks and max logits")
class MaxLogitsOfTheLastTile(Honest):
    def max_logits(self, masked, capped):
        last = (masked.shape[2] - 1) // 128 * 128
        return super().max_logits(masked[:, :, last:], capped)


@lie("beyond its tiles, lse")
class RepeatsTheFirstTileOfLse(Honest):
    def returned_lse(self, lse):
        return lse[..., jnp.arange(lse.shape[2]) % 128]


@lie("beyond its tiles, lse")
class LseWithoutGradientBeyondATile(Honest):
    def returned_lse(self, lse):
        return jnp.where(beyond(lse.shape[2]), jax.lax.stop_gradient(lse), lse)


@lie("beyond its tiles, lse", backward=True)
class DropsTheKeyGradientBeyondATile(HonestBackward):
    def d_key(self, d_key):
        return jnp.where(beyond(d_key.shape[1])[:, None, None], 0, d_key)


@lie("beyond its tiles, lse", backward=True)
class LeavesOutDeltaBeyondATile(HonestBackward):
    def delta(self, out, d_out, d_lse):
        return jnp.where(beyond(out.shape[1]), 0, super().delta(out, d_out, d_lse))


@lie("beyond its tiles, lse", backward=True)
class DropsTheCotangentOfLseBeyondATile(HonestBackward):
    def delta(self, out, d_out, d_lse):
        delta = super().delta(out, d_out, d_lse)
        return jnp.where(beyond(out.shape[1]), super().delta(out, d_out, None), delta)


_NO_COTANGENT = dataclasses.replace(BACKWARD, lse_cotangent=False)
"""Only adapters call the backward of such a kernel."""


@lie("beyond its tiles, backward", backward=True, capabilities=_NO_COTANGENT)
class LeavesOutDeltaBeyondATileOfAnAdapter(HonestBackward):
    def delta(self, out, d_out, d_lse):
        return jnp.where(beyond(out.shape[1]), 0, super().delta(out, d_out, d_lse))


@lie("beyond its tiles, quantised keys: int8:head_dim")
class RepeatsTheScalesOfTheFirstTile(Honest):
    def scale_of(self, array):
        return array.scale[:, jnp.arange(array.scale.shape[1]) % 128]


@lie("beyond its tiles, quantised keys: int8:heads")
class RepeatsTheScalesOfWholeTokens(Honest):
    def scale_of(self, array):
        whole_tokens = array.scale.shape[-2] != array.values.shape[-2]
        return array.scale[:, jnp.minimum(jnp.arange(array.scale.shape[1]), 127)] if whole_tokens else array.scale


@lie("beyond its tiles, pages")
class ReadsEightPages(Honest):
    def order(self, table):
        return super().order(table)[:, jnp.arange(table.shape[1]) % 8]


@lie("beyond its tiles, quantised pages")
class ReadsEightPagesOfScales(Honest):
    def side_by_side(self, pages, table):
        found = super().side_by_side(pages, table)
        if pages.shape[-1] > 1:
            return found
        return found[:, jnp.arange(found.shape[1]) % (8 * pages.shape[1])]


def bits(key, request, shape):
    return jax.random.bernoulli(key, 1 - request.dropout_rate, shape)


@lie("dropout beyond its tiles")
class RepeatsDropoutBitsOverTheKeys(Honest):
    def dropped(self, probabilities, inputs, request):
        if not request.dropout_rate:
            return probabilities
        kept = bits(inputs.dropout_rng, request, probabilities.shape)[..., jnp.arange(request.kv_len) % 128]
        return jnp.where(kept, probabilities / (1 - request.dropout_rate), 0)


@lie("dropout beyond its tiles")
class RepeatsDropoutBitsOverTheQueries(Honest):
    def dropped(self, probabilities, inputs, request):
        if not request.dropout_rate:
            return probabilities
        kept = bits(inputs.dropout_rng, request, probabilities.shape)[:, :, jnp.arange(request.q_len) % 128]
        return jnp.where(kept, probabilities / (1 - request.dropout_rate), 0)


@lie("dropout beyond its tiles")
class DropsAlikeInTilesMirroredAtTheDiagonal(Honest):
    def dropped(self, probabilities, inputs, request):
        if not request.dropout_rate:
            return probabilities
        kept = bits(inputs.dropout_rng, request, probabilities.shape)
        rows, keys = jnp.ix_(jnp.arange(request.q_len), jnp.arange(request.kv_len))
        above = (keys // 128 > rows // 128) & (keys < request.q_len)
        mirrored = kept[:, :, jnp.where(above, keys // 128 * 128 + rows % 128, rows) % request.q_len, keys % 128]
        return jnp.where(jnp.where(above, mirrored, kept), probabilities / (1 - request.dropout_rate), 0)


@lie("dropout beyond its tiles")
class DropsNothingBeyondATile(Honest):
    def dropped(self, probabilities, inputs, request):
        dropped = super().dropped(probabilities, inputs, request)
        return jnp.where(beyond(request.kv_len), probabilities, dropped)


@lie("dropout drops alike")
class DifferentiatesLogitsAsIfNothingWereDropped(Honest):
    def dropped(self, probabilities, inputs, request):
        dropped = super().dropped(probabilities, inputs, request)
        return probabilities + jax.lax.stop_gradient(dropped - probabilities)


@lie("dropout beyond its tiles")
class DifferentiatesLogitsAsIfNothingWereDroppedBeyondATile(Honest):
    def dropped(self, probabilities, inputs, request):
        dropped = super().dropped(probabilities, inputs, request)
        lied = probabilities + jax.lax.stop_gradient(dropped - probabilities)
        return jnp.where(beyond(request.kv_len), lied, dropped)


@lie("dropout beyond its tiles")
class DropsOtherKeysBackwardBeyondATile(Honest):
    def dropped(self, probabilities, inputs, request):
        self.dropping = bool(request.dropout_rate)
        return super().dropped(probabilities, inputs, request)

    def output(self, probabilities, value, empty):
        out = super().output(probabilities, jax.lax.stop_gradient(value) if self.dropping else value, empty)
        if not self.dropping:
            return out
        other = jnp.where(beyond(value.shape[1]), jnp.roll(probabilities, 1, axis=2), probabilities)
        lied = super().output(jax.lax.stop_gradient(other), value, empty)
        return out + lied - jax.lax.stop_gradient(lied)


@lie("bfloat16 sums")
class SumsInBfloat16(Honest):
    def output(self, probabilities, value, empty):
        if value.dtype != jnp.bfloat16:
            return super().output(probabilities, value, empty)
        products = jnp.moveaxis(probabilities, 3, 0)[..., None], jnp.moveaxis(value, 1, 0)[:, :, :, None]
        zero = jnp.zeros((*probabilities.shape[:3], value.shape[3]), jnp.bfloat16)
        add = lambda total, each: (total + (each[0] * each[1]).astype(jnp.bfloat16), None)  # noqa: E731
        out = jax.lax.scan(add, zero, products)[0].swapaxes(1, 2)
        return jnp.where(empty.swapaxes(1, 2)[..., None], 0, out)


@lie("logits of ±180")
class DoesNotSubtractTheMaximum(Honest):
    def top(self, masked):
        return jnp.zeros(masked.shape[:3])


@lie("logits of ±180")
class SubtractsTheMeanInPlaceOfTheMaximum(Honest):
    def top(self, masked):
        seen = jnp.isfinite(masked)
        return jnp.where(seen, masked, 0).sum(axis=3) / jnp.maximum(seen.sum(axis=3), 1)


@lie("logits around −130")
class StartsTheMaximumAtZero(Honest):
    def top(self, masked):
        return masked.max(axis=3, initial=0)


@lie("logits around −130")
class TakesLowRowsForEmptyOnes(Honest):
    def weights(self, masked, top):
        return jnp.where(top[..., None] < -100, 0, super().weights(masked, top))


@lie("a negative scale")
class PutsTheRootOfTheScaleIntoBothSides(Honest):
    def scale(self, request):
        return abs(request.scale)


@lie("a negative scale")
class TakesTheMaximumBeforeTheScale(Honest):
    def top(self, masked):
        finite = jnp.where(jnp.isfinite(masked), masked, jnp.inf)
        lowest = finite.min(axis=3, initial=jnp.inf)
        return jnp.where(self.negative, jnp.where(jnp.isinf(lowest), 0, lowest), super().top(masked))

    def scale(self, request):
        self.negative = request.scale < 0
        return request.scale


@lie("a scale of 0")
class TakesAScaleOfZeroForNone(Honest):
    def scale(self, request):
        return request.scale or request.default_scale


@lie("B = 3")
class ReadsBatchRowsInPairs(Honest):
    def output(self, probabilities, value, empty):
        out = super().output(probabilities, value, empty)
        return jnp.where((jnp.arange(out.shape[0]) < max(1, out.shape[0] // 2 * 2))[:, None, None, None], out, 0)


def has_offsets(mask):
    return isinstance(mask, At) and all(isinstance(where, StaticOffset | None) for where in (mask.query, mask.kv))


def borders_by_slot(mask):
    if isinstance(mask, BlockCausal):
        return Instead(lambda query, kv: kv.slots // mask.size <= query.slots // mask.size)
    if not isinstance(mask, Chunked):
        return mask
    same = Instead(lambda query, kv: kv.slots // mask.size == query.slots // mask.size)
    return And((same, Band(None, 0)))


@lie("block causal at the same offset")
class BordersBySlotAtOffsets(Honest):
    def masks(self, inputs):
        return tuple(changed(mask, borders_by_slot) if has_offsets(mask) else mask for mask in inputs.mask)


@lie("block causal at shifted positions")
class BordersBySlotAtStaticPositions(Honest):
    def masks(self, inputs):
        moved = [isinstance(mask, At) and not has_offsets(mask) for mask in inputs.mask]
        return tuple(changed(mask, borders_by_slot) if m else mask for mask, m in zip(inputs.mask, moved, strict=True))


@lie("chunked at the same")
class ChunkBordersFromTheFirstKey(OtherMasks):
    def other(self, mask):
        size = getattr(mask, "size", None)
        if not isinstance(mask, Chunked):
            return mask

        def answer(query, kv):
            first = kv.positions.min(axis=3, keepdims=True)
            same = (query.positions - first) // size == (kv.positions - first) // size
            return same & (kv.positions <= query.positions)

        return Instead(answer)


@lie("far out")
class HoldsPositionsInFloat32(OtherMasks):
    def other(self, mask):
        def rounded(side):
            return dataclasses.replace(side, positions=side.positions.astype(jnp.float32).astype(jnp.int32))

        return Instead(lambda query, kv: mask.evaluate(rounded(query), rounded(kv)))


@lie("a query offset")
class AlignsCausalMasksAtTheEnd(Honest):
    def masks(self, inputs):
        more = inputs.key.shape[1] - inputs.query.shape[1]
        return tuple(mask.mask.at(query_offset=more) if isinstance(mask, At) else mask for mask in inputs.mask)

    def attend(self, inputs, request, statistics):
        return super().attend(self.read(inputs), request, statistics)


@lie("amid the keys")
class TakesACausalStepForTheLast(OtherMasks):
    def other(self, mask):
        plain = isinstance(mask, Band) and (mask.left, mask.right) == (None, 0)
        return Instead(lambda query, kv: (query.slots.size == 1) | mask.evaluate(query, kv)) if plain else mask


@lie("traced offsets")
class ReadsTheFirstRowsOffset(Honest):
    def masks(self, inputs):
        def first(where):
            rows = where is not None and [leaf for leaf in jax.tree.leaves(where) if leaf.ndim == 1]
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), where) if rows else where

        return tuple(
            At(mask.mask, first(mask.query), first(mask.kv)) if isinstance(mask, At) else mask for mask in inputs.mask
        )


@lie("window at traced")
class HasNoRightEdgeAtTracedPositions(Honest):
    def masks(self, inputs):
        def wide(mask):
            return Band(mask.left, None) if isinstance(mask, Band) and mask.left is not None else mask

        traced = [isinstance(mask, At) and bool(jax.tree.leaves((mask.query, mask.kv))) for mask in inputs.mask]
        return tuple(changed(mask, wide) if t else mask for mask, t in zip(inputs.mask, traced, strict=True))


@lie("prefix")
class PrefixOneKeyLonger(OtherMasks):
    def other(self, mask):
        return PrefixLM(mask.prefix_lengths + 1) if isinstance(mask, PrefixLM) else mask


@lie("prefix")
class PrefixWithoutThePast(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, PrefixLM):
            return mask
        prefix = mask.prefix_lengths.reshape(-1, 1, 1, 1)
        return Instead(
            lambda query, kv: jnp.where(
                kv.positions < prefix, query.positions < prefix, kv.positions <= query.positions
            )
        )


@lie("segments")
class TakesSegmentZeroForPadding(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, Segments):
            return mask
        given = [ids for ids in (mask.query_ids, mask.kv_ids) if ids is not None]
        return Segments(*(jnp.where(jnp.asarray(ids) == 0, -1, ids) for ids in given))


@lie("segments of two sides")
class ReadsKeysSegmentsFromTheQueries(OtherMasks):
    def other(self, mask):
        return Segments(mask.query_ids) if isinstance(mask, Segments) else mask


@lie("dense")
class ReadsTheFirstRowsDenseMask(OtherMasks):
    def other(self, mask):
        return Dense(mask.array[:1]) if isinstance(mask, Dense) else mask


@lie("or")
class TakesOrForAnd(OtherMasks):
    def other(self, mask):
        return And(mask.parts) if isinstance(mask, Or) else mask


@lie("spans")
class SpansOfNegativeIds(OtherMasks):
    def other(self, mask):
        if not isinstance(mask, BidirectionalSpans):
            return mask
        kv = mask.query_spans if mask.kv_spans is None else mask.kv_spans
        return BidirectionalSpans(jnp.abs(jnp.asarray(mask.query_spans)), jnp.abs(jnp.asarray(kv)))


@lie("N = 6, K = 2")
class GroupsHeadsByTheNearestPowerOfTwo(Honest):
    def expanded(self, array, request):
        size = 1 << round(math.log2(request.groups))
        heads = jnp.minimum(jnp.arange(request.q_heads) // size, request.kv_heads - 1)
        return array[:, :, heads]


@lie("full attention")
class TakesTheKeyGradientFromOneQueryHead(Honest):
    def expanded(self, array, request):
        first = jnp.arange(request.q_heads) % request.groups == 0
        array = super().expanded(array, request)
        return jnp.where(first[:, None], array, jax.lax.stop_gradient(array))


@lie("H = 8, D = 16")
class CutsValuesAtTheHeadDim(Honest):
    def output(self, probabilities, value, empty):
        out = super().output(probabilities, value, empty)
        return jnp.where(jnp.arange(out.shape[3]) < self.head_dim, out, 0)

    def logits(self, query, key, request):
        self.head_dim = request.head_dim
        return super().logits(query, key, request)


@lie("soft cap")
class DifferentiatesAsIfNothingWereCapped(Honest):
    def capped(self, logits, inputs, visible, request):
        capped = super().capped(logits, inputs, visible, request)
        return logits + jax.lax.stop_gradient(jnp.where(visible, capped - logits, 0))


@lie("slots biased by −1e9")
class ClipsTheBias(Honest):
    def biased(self, logits, inputs):
        return logits if inputs.bias is None else logits + jnp.maximum(inputs.bias.astype(jnp.float32), -1e4)


@lie("slots biased by −inf")
class LosesRowsWithAnInfiniteBias(Honest):
    def biased(self, logits, inputs):
        if inputs.bias is None:
            return logits
        logits = super().biased(logits, inputs)
        return logits - jnp.max(logits - logits, axis=3, keepdims=True)


@lie("bias of shape (1,")
class TakesTheGradientOfASharedBiasFromTheFirstRow(Honest):
    def biased(self, logits, inputs):
        if inputs.bias is None or inputs.bias.shape[0] == logits.shape[0]:
            return super().biased(logits, inputs)
        bias = jnp.broadcast_to(inputs.bias.astype(jnp.float32), logits.shape)
        first = (jnp.arange(logits.shape[0]) == 0)[:, None, None, None]
        return logits + jnp.where(first, bias, jax.lax.stop_gradient(bias))


@lie("sinks")
class ReadsTheSinkOfTheKeyHead(Honest):
    def sinks(self, inputs):
        groups = inputs.query.shape[2] // inputs.key.shape[2]
        sinks = super().sinks(inputs)
        return sinks[jnp.arange(sinks.shape[0]) // groups]


@lie("empty rows with sinks")
class SinksFillEmptyRows(Honest):
    def with_sinks(self, out, lse, inputs):
        mean = 0 if inputs.sinks is None else self.read(inputs).value.astype(jnp.float32).mean()
        return jnp.where(jnp.isneginf(lse).swapaxes(1, 2)[..., None], mean, super().with_sinks(out, lse, inputs))


@lie("every feature at once")
class MaxLogitsBeforeTheCap(Honest):
    def capped(self, logits, inputs, visible, request):
        self.uncapped = jnp.where(visible, logits, -jnp.inf)
        return super().capped(logits, inputs, visible, request)

    def max_logits(self, masked, capped):
        return self.uncapped.max(axis=(2, 3), initial=-jnp.inf)


@lie("max logits")
class MaxLogitsInBaseTwo(Honest):
    def max_logits(self, masked, capped):
        return super().max_logits(masked, capped) / jnp.log(2.0)


@lie("lse under dropout")
class LseOfTheDroppedProbabilities(Honest):
    def lse(self, lse, empty, request):
        return super().lse(lse + jnp.log1p(-request.dropout_rate), empty, request)


@lie("dropout")
class DropsTheSameKeysInEveryHead(Honest):
    def dropped(self, probabilities, inputs, request):
        if not request.dropout_rate:
            return probabilities
        one = jax.random.bernoulli(inputs.dropout_rng, 1 - request.dropout_rate, (2, 1, *probabilities.shape[2:]))
        return jnp.where(one, probabilities / (1 - request.dropout_rate), 0)


@lie("dropout")
class DropsWholeQueries(Honest):
    def dropped(self, probabilities, inputs, request):
        if not request.dropout_rate:
            return probabilities
        shape = (*probabilities.shape[:3], 1)
        kept = jax.random.bernoulli(inputs.dropout_rng, 1 - request.dropout_rate, shape)
        return jnp.where(kept, probabilities / (1 - request.dropout_rate), 0)


@lie("lse", backward=True)
class ForgetsTheScaleInTheGradientOfKeys(HonestBackward):
    def summed(self, by_query_head, request):
        self.found = request.scale
        return super().summed(by_query_head, request)

    def d_key(self, d_key):
        return d_key / self.found


@lie("lse", backward=True)
class SumsNoGroups(HonestBackward):
    def summed(self, by_query_head, request):
        shape = (*by_query_head.shape[:2], request.kv_heads, request.groups, by_query_head.shape[3])
        return by_query_head.reshape(shape)[:, :, :, 0]


@lie("lse", backward=True)
class AddsTheCotangentOfLse(HonestBackward):
    def delta(self, out, d_out, d_lse):
        return super().delta(out, d_out, None if d_lse is None else -d_lse)


@lie("lse", backward=True)
class DifferentiatesHiddenPairs(HonestBackward):
    def backward(self, inputs, request, tiling, out, lse, d_out, d_lse):
        return super().backward(dataclasses.replace(inputs, mask=()), request, tiling, out, lse, d_out, d_lse)


@lie("pages")
class ReadsTheTableOffByOne(Honest):
    def order(self, table):
        return jnp.roll(super().order(table), 1, axis=1)


@lie("quantised keys")
class TakesTheScaleOfTheTokenBefore(Honest):
    def scale_of(self, array):
        return jnp.roll(array.scale, 1, axis=1)


@lie("quantised keys: int4")
class ReadsInt4Unsigned(Honest):
    def scaled(self, array):
        if isinstance(array, QuantizedArray) and array.values.dtype == jnp.int4:
            array = QuantizedArray(array.values.astype(jnp.int32) % 16, array.scale)
        return super().scaled(array)


@lie("full attention")
class ReturnsAnotherLayout(Honest):
    def forward(self, inputs, request, tiling, *, statistics):
        partial = super().forward(inputs, request, tiling, statistics=statistics)
        return dataclasses.replace(partial, out=partial.out.reshape(partial.out.swapaxes(1, 2).shape))


@lie("full attention")
class ReturnsABareArray(Honest):
    def forward(self, inputs, request, tiling, *, statistics):
        return super().forward(inputs, request, tiling, statistics=statistics).out


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


@lie("sinks of ±40")
class DoesNotSubtractTheMaximumBeforeSinks(Honest):
    def with_sinks(self, out, lse, inputs):
        if inputs.sinks is None:
            return out
        total = jnp.exp(lse)
        share = total / jnp.where(total == 0, 1, total + jnp.exp(self.sinks(inputs))[None, :, None])
        return out * share.swapaxes(1, 2)[..., None]


class NarrowsIds(OtherMasks):
    """Compares ids in another dtype."""

    def other(self, mask):
        if not isinstance(mask, Segments | BidirectionalSpans):
            return mask
        given = (mask.query_ids, mask.kv_ids) if isinstance(mask, Segments) else (mask.query_spans, mask.kv_spans)
        return type(mask)(*(ids if ids is None else self.narrowed(mask, jnp.asarray(ids)) for ids in given))

    def narrowed(self, mask, ids):
        return ids.astype(self.dtype).astype(jnp.int32) if isinstance(mask, self.kinds) else ids


@lie("segments of large ids")
class HoldsSegmentsInInt8(NarrowsIds):
    kinds, dtype = Segments, jnp.int8


@lie("segments of large ids")
class HoldsSegmentsInInt16(NarrowsIds):
    kinds, dtype = Segments, jnp.int16


@lie("segments of large ids")
class HoldsSegmentsInFloat32(NarrowsIds):
    kinds, dtype = Segments, jnp.float32


@lie("spans of large ids")
class HoldsSpansInFloat32(NarrowsIds):
    kinds, dtype = BidirectionalSpans, jnp.float32


@lie("large ids of two sides")
class HoldsSegmentsOfTwoSidesInInt16(NarrowsIds):
    kinds, dtype = Segments, jnp.int16

    def narrowed(self, mask, ids):
        shared = isinstance(mask, Segments) and mask.kv_ids is None
        return ids if shared else super().narrowed(mask, ids)


@lie("a soft cap of 30")
class IgnoresSoftCapsAboveTen(Honest):
    def capped(self, logits, inputs, visible, request):
        if request.soft_cap is not None and request.soft_cap > 10:
            return logits
        return super().capped(logits, inputs, visible, request)


@lie("parts of one backward", backward=True)
class TakesAnInfiniteLseForZero(HonestBackward):
    """Leaves it to lse that rows which see nothing have no gradient, and takes an infinite one for 0."""

    blank = False

    def backward(self, inputs, request, tiling, out, lse, d_out, d_lse):
        self.blank = jnp.isposinf(lse)[..., None]
        zeroed = jnp.where(jnp.isposinf(lse), 0, lse)
        found = super().backward(inputs, request, tiling, out, zeroed, d_out, d_lse)
        self.blank = False
        return found

    def visible(self, inputs, request):
        return super().visible(inputs, request) | self.blank


@lie("lse of logits of ±180")
class LseWithoutTheMaximum(Honest):
    def top(self, masked):
        self.plain = jnp.log(jnp.exp(masked).sum(axis=3))
        return super().top(masked)

    def returned_lse(self, lse):
        return jnp.where(jnp.isneginf(lse), lse, self.plain)


@lie("max logits around −130")
class StartsMaxLogitsAtZero(Honest):
    def max_logits(self, masked, capped):
        found = super().max_logits(masked, capped)
        return jnp.where(jnp.isneginf(found), found, jnp.maximum(found, 0))


@lie("chunked at offsets below 0")
class TruncatesNegativePositions(OtherMasks):
    """Divides as C does, toward 0."""

    def other(self, mask):
        if not isinstance(mask, Chunked):
            return mask

        def chunk(side):
            return jnp.sign(side.positions) * (jnp.abs(side.positions) // mask.size)

        return And((Instead(lambda query, kv: chunk(kv) == chunk(query)), Band(None, 0)))


@lie("value_in_key")
class ReadsTheValueFromTheLastColumns(Honest):
    def columns(self, key, width):
        return key[..., key.shape[3] - width :]


@lie("value_in_key")
class ReadsTheValueOneColumnOn(Honest):
    def columns(self, key, width):
        return jnp.roll(key, -1, axis=3)[..., :width]


@lie("interleaved")
class TakesInterleavedPagesForHalves(Honest):
    def alternating(self, both):
        return jnp.split(both, 2, axis=2)


@lie("interleaved")
class ReadsTheValueBeforeTheKey(Honest):
    def alternating(self, both):
        return both[:, :, 1::2], both[:, :, 0::2]


@lie("value_in_key, lse", backward=True)
class ForgetsTheShareOfTheValues(HonestBackward):
    def both_shares(self, d_key, d_value):
        return d_key
