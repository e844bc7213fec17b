"""Continuous batching: requests share one paged cache, and are admitted, read, decoded and evicted step by step."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernelry import Mode
from kernelry.cache import PagedCache
from lm.model import Decoder


@dataclasses.dataclass(frozen=True)
class Request:
    """Bytes to continue.

    Args:
      name: a number of its own.
      prompt: bytes, without the system prompt.
      length: how many bytes to add.
      arrives: the step from which on the server knows of it.
    """

    name: int
    prompt: tuple[int, ...]
    length: int
    arrives: int = 0


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """The cache and the steps of a server.

    Args:
      rows: sequences served at a time, one of them the system prompt where there is one.
      pages, page_size: of the cache that all share.
      max_length: the most tokens of a sequence.
      chunk: the tokens of a prompt that are read in one step, so that a long one does not stall the others.
      storage: how keys and values are held: a dtype's name or a quantization.
      system: bytes that every sequence begins with.
    """

    rows: int = 8
    pages: int = 48
    page_size: int = 16
    max_length: int = 256
    chunk: int = 32
    storage: str = "float32"
    system: tuple[int, ...] = ()

    @property
    def shared_pages(self) -> int:
        """The pages that the system prompt fills."""
        return len(self.system) // self.page_size

    def pages_for(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_size)


@dataclasses.dataclass
class Sequence:
    """A request on its way: `read` of its tokens are in the cache."""

    request: Request
    tokens: list[int]
    read: int = 0
    row: int = -1
    produced: list[int] = dataclasses.field(default_factory=list)
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def decodes(self) -> bool:
        """Whether one token is left to read, so that it goes with the other rows that decode."""
        return len(self.tokens) - self.read == 1

    @property
    def is_done(self) -> bool:
        """Whether all is produced."""
        return len(self.produced) == self.request.length

    def add(self, logits: np.ndarray) -> None:
        """Takes the likeliest byte."""
        token = int(logits.argmax())
        self.tokens.append(token)
        self.produced.append(token)
        self.logits.append(logits)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step did: names of requests."""

    admitted: tuple[int, ...]
    chunk_of: int | None
    decoded: tuple[int, ...]
    evicted: tuple[int, ...]
    preempted: tuple[int, ...]
    pages_used: int


class Server:
    """Serves requests from one cache.

    A step admits requests whose prompts the free pages can hold, reads one chunk of the oldest prompt that is not read,
    and decodes one token of every other row. Where pages run out the youngest sequence is preempted: its pages are
    freed, and it waits at the head of the queue to be read again, with what it has produced. The oldest always goes on,
    so all are served.
    """

    def __init__(self, model: Decoder, settings: ServerSettings) -> None:
        self.settings = settings
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []  # from the oldest to the youngest
        self.done: dict[int, Sequence] = {}
        self.steps: list[Step] = []
        self._events: dict[str, list[int]] = collections.defaultdict(list)
        self._model = _compiled(model, settings.shared_pages)
        self.cache = empty_cache(model, settings)
        self._rows = list(range(settings.rows))
        if settings.system:
            self._system = self._rows.pop()
            self._read_system()

    def submit(self, requests: Iterable[Request]) -> None:
        """Queues requests.

        Raises:
          ValueError: one is empty, or could never be served.
        """
        for request in requests:
            if not request.prompt or request.length < 1:
                raise ValueError(f"request {request.name} must have a prompt and ask for at least one byte.")
            tokens = [*self.settings.system, *request.prompt]
            most = len(tokens) + request.length
            room = self.settings.pages + self.settings.shared_pages - self.settings.pages_for(len(self.settings.system))
            if most > self.settings.max_length or self.settings.pages_for(most) > room:
                raise ValueError(
                    f"request {request.name} grows to {most} tokens; max_length is {self.settings.max_length} and "
                    f"{room} pages of {self.settings.page_size} are there for it."
                )
            self.waiting.append(Sequence(request, tokens))

    @property
    def is_idle(self) -> bool:
        """Whether all requests are done."""
        return not self.waiting and not self.running

    @property
    def pages_used(self) -> int:
        """Pages that some row holds."""
        return self.settings.pages - int(self.cache.free_pages)

    def step(self) -> Step:
        """Admits, reads a chunk, decodes, evicts."""
        self._events.clear()
        self._admit()
        chunk_of = self._read_chunk()
        self._decode()
        events = {name: tuple(self._events[name]) for name in ("admitted", "decoded", "evicted", "preempted")}
        self.steps.append(Step(chunk_of=chunk_of, pages_used=self.pages_used, **events))
        return self.steps[-1]

    def warm_up(self) -> None:
        """Compiles the steps, by steps of no token."""
        rows = self.settings.rows
        self._run(self._model.read, [], 0)
        self._call(self._model.decode, np.zeros((rows, 1), np.int32), np.zeros(rows, np.int32))
        self.cache = _freed(self.cache, 0)
        _ = self.pages_used

    def run(self, watch: Callable[[Server], None] = lambda _: None) -> None:
        """Steps until all is done."""
        while not self.is_idle:
            self.step()
            watch(self)

    def _admit(self) -> None:
        settings = self.settings
        promised = sum(settings.pages_for(len(one.tokens)) - settings.pages_for(one.read) for one in self.running)
        free = int(self.cache.free_pages) - promised
        while self.waiting and self._rows and self.waiting[0].request.arrives <= len(self.steps):
            needed = settings.pages_for(len(self.waiting[0].tokens) + 1) - settings.shared_pages
            if needed > free:
                return  # no later request goes first: a long prompt would wait for ever
            free -= needed
            self._begin(self.waiting.popleft())

    def _begin(self, sequence: Sequence) -> None:
        sequence.row = self._rows.pop()
        if self.settings.system:
            self.cache = _forked(self.cache, self._system, sequence.row)
        sequence.read = len(self.settings.system)
        self.running.append(sequence)
        self._events["admitted"].append(sequence.request.name)

    def _read_chunk(self) -> int | None:
        while True:
            sequence = next((one for one in self.running if not one.decodes), None)
            if sequence is None:
                return None
            chunk = sequence.tokens[sequence.read :][: self.settings.chunk]
            logits = self._run(self._model.read, chunk, sequence.row)
            if logits is None:
                continue
            sequence.read += len(chunk)
            if sequence.read == len(sequence.tokens):
                self._add(sequence, logits[0])
            return sequence.request.name

    def _read_system(self) -> None:
        for at in range(0, len(self.settings.system), self.settings.chunk):
            chunk = self.settings.system[at : at + self.settings.chunk]
            if self._run(self._model.read, list(chunk), self._system) is None:
                raise ValueError(
                    f"the system prompt has {len(self.settings.system)} bytes; the cache needs more pages."
                )

    def _decode(self) -> None:
        logits = None
        while logits is None:
            rows = [one for one in self.running if one.decodes]
            if not rows:
                return
            counts, tokens = np.zeros(self.settings.rows, np.int32), np.zeros((self.settings.rows, 1), np.int32)
            for one in rows:
                counts[one.row], tokens[one.row] = 1, one.tokens[-1]
            logits = self._call(self._model.decode, tokens, counts)
        for one in rows:
            one.read += 1
            self._add(one, logits[one.row])
            self._events["decoded"].append(one.request.name)

    def _run(self, read: Callable[..., Any], chunk: list[int], row: int) -> np.ndarray | None:
        tokens = np.zeros((1, self.settings.chunk), np.int32)
        tokens[0, : len(chunk)] = chunk
        return self._call(read, tokens, np.array([len(chunk)], np.int32), np.array([row], np.int32))

    def _call(self, function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray | None:
        """Runs a step of the model; None where pages ran out: nothing has changed, and a sequence less is running."""
        logits, self.cache = function(self.cache, *arrays)
        if not self.cache.overflowed:
            return np.asarray(logits, np.float32)
        if self.running:
            self._preempt()
        return None

    def _preempt(self) -> None:
        sequence = self.running.pop()
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self._events["preempted"].append(sequence.request.name)

    def _add(self, sequence: Sequence, logits: np.ndarray) -> None:
        sequence.add(logits)
        if sequence.is_done:
            self.running.remove(sequence)
            self._leave(sequence)
            self.done[sequence.request.name] = sequence
            self._events["evicted"].append(sequence.request.name)

    def _leave(self, sequence: Sequence) -> None:
        self.cache = _freed(self.cache, sequence.row)
        self._rows.append(sequence.row)


def empty_cache(model: Decoder, settings: ServerSettings) -> PagedCache:
    """Returns a cache for all layers of a model."""
    plain = settings.storage in ("float32", "bfloat16")
    return PagedCache.create(
        rows=settings.rows,
        pages=settings.pages,
        page_size=settings.page_size,
        max_length=settings.max_length,
        kv_heads=model.settings.kv_heads,
        head_dim=model.settings.head_dim,
        layers=len(model.blocks),
        dtype=settings.storage if plain else jnp.float32,
        storage=None if plain else settings.storage,
    )


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """The steps of a model, compiled for static shapes; the cache is donated, so that pages are written in place."""

    read: Callable[..., tuple[jax.Array, PagedCache]]
    decode: Callable[..., tuple[jax.Array, PagedCache]]


def _compiled(model: Decoder, shared_pages: int) -> _Compiled:
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=1)
    def read(state: Any, cache: PagedCache, tokens: jax.Array, counts: jax.Array, rows: jax.Array) -> Any:
        return nnx.merge(graph, state).paged(tokens, cache, counts, mode=Mode.PREFILL, rows=rows)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(state: Any, cache: PagedCache, tokens: jax.Array, counts: jax.Array) -> Any:
        return nnx.merge(graph, state).paged(tokens, cache, counts, mode=Mode.DECODE, shared_pages=shared_pages)

    return _Compiled(functools.partial(read, state), functools.partial(decode, state))


@functools.partial(jax.jit, donate_argnums=0)
def _freed(cache: PagedCache, row: int) -> PagedCache:
    """Frees a row; and what overflowed may be tried again."""
    return cache.free(row).recovered()


@functools.partial(jax.jit, donate_argnums=0)
def _forked(cache: PagedCache, source: int, target: int) -> PagedCache:
    return cache.fork(source, target)
