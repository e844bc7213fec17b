"""The sizes of flywheel's blocks over pages, and the memory that they take."""

from __future__ import annotations

from kernelry.plugin import Request, Target, Tiling, round_up
from kernelry_tpu_flywheel.lanes import LANES

STAGES = 2
"""Blocks in vector memory: one is read while the next is copied."""

TILE = 8
"""Slots that are copied at once: the last ones of a row come with what follows them, up to 7 slots."""

_MIB = 2**20

_MOST_VECTOR_BYTES = 100 * _MIB
"""What the vendor compiles its kernels for where a core has 128 MiB."""

_SMALLER_CORES = {"tpu7x": 64 * _MIB}
"""Chips whose cores have less."""

MOST_TABLE_BYTES = 896 * 2**10
"""Of the 1 MiB of scalar memory that v5e has."""

MOST_LOGITS_BYTES = 256 * _MIB
"""What a program sets aside for the rows that the vendor cannot express."""

MOST_KEYS = 2**31 - 1
"""The vendor's kernel for chunks numbers blocks and heads by 32 bits."""

_MOST_STAGED_BYTES = 16 * _MIB
"""Of the blocks of a decode step. The vendor stages 8 Mi numbers, as many bytes."""

_DECODE_SLOTS = (1024, 512, 256, 128, 2048)
"""Slots of a block of a decode step, the vendor's default first. The order after it is not measured."""

_CHUNK_SLOTS = (1024, 512, 256, 128, 2048)
"""Slots of a block of a chunk, by the vendor's times on v6e: a block of 2048 queries goes best with 1024 slots."""

_WINDOW_SLOTS = 512
"""The most queries, and slots, of a block under a window; the vendor's, by its times on v6e."""

_COMPUTED_SLOTS = (512, 384, 256, 128)
"""Slots that are multiplied at once; one of these divides every block."""

_COMPUTED_ROWS = 1024
"""Rows T · G of one multiplication in a chunk; the vendor's, by its times on v6e."""

_MOST_AREA = 2048 * 1024
"""Rows times slots of a block of a chunk; the vendor's, by its times on v6e."""

_LEAST_ROWS = 16
"""Rows of a register of bfloat16 numbers."""


def vector_limit(target: Target) -> int:
    """The bytes of vector memory that a kernel may use on a chip."""
    return _SMALLER_CORES.get(target.kind or "", _MOST_VECTOR_BYTES)


def left_of(request: Request) -> int | None:
    """The slots before its own that a query sees; None where the mask has no such bound."""
    bounds = [atom.params[0] for atom in request.mask.atoms if atom.is_band]
    return bounds[0] if bounds else None


def is_causal(request: Request) -> bool:
    """Whether a query sees no slot after its own."""
    return any(atom.is_band and atom.params[1] is not None for atom in request.mask.atoms)


def has_query_lengths(request: Request) -> bool:
    """Whether rows may have fewer queries than T."""
    return any("query" in atom.params for atom in request.mask.atoms if not atom.is_band)


def pages_seen(request: Request) -> int:
    """The pages of a row from the first that some query sees to the last: all, but under a window."""
    page_size = page_size_of(request)
    whole, left = -(-request.kv_len // page_size), left_of(request)
    return whole if left is None else min(whole, (left + request.q_len - 1) // page_size + 2)


def page_size_of(request: Request) -> int:
    """The slots of a page."""
    assert request.page_size is not None
    return request.page_size


def sequences_of(request: Request) -> int:
    """The runs of queries that the kernel is given: the rows, and what follows their last queries where it may."""
    return request.batch * (2 if request.q_len > 1 and has_query_lengths(request) else 1)


def table_bytes(request: Request) -> int:
    """The bytes that the table takes in scalar memory."""
    return sequences_of(request) * pages_seen(request) * 4


def logits_bytes(request: Request) -> int:
    """The bytes of the logits of a page, where a call is computed page by page."""
    return request.batch * request.q_heads * request.q_len * page_size_of(request) * 4


def staging_keys(request: Request) -> int:
    """The numbers by which the vendor's kernel for chunks tells staged blocks apart, at most."""
    slots = pages_seen(request) * page_size_of(request)
    return sequences_of(request) * request.kv_heads * (slots // LANES) * (2 * LANES // TILE + 1)


def staged_bytes(request: Request, slots: int) -> int:
    """The bytes of the blocks that a decode step holds: a slot of an even number of heads takes one more."""
    heads = request.kv_heads + 1 - request.kv_heads % 2
    return STAGES * slots * heads * 2 * round_up(request.head_dim, LANES) * 2


def vector_bytes(request: Request, tiling: Tiling) -> int:
    """The bytes of vector memory that a call takes."""
    return _bytes_of_decode(request, tiling) if request.q_len == 1 else _bytes_of_chunk(request, tiling)


def _bytes_of_chunk(request: Request, tiling: Tiling) -> int:
    """Blocks of queries, results, keys and values; sums of rows; five numbers a pair of one multiplication."""
    width, slots = round_up(request.head_dim, LANES), tiling["block_kv"]
    rows = request.groups * tiling["block_q"]
    blocks = 2 * STAGES * rows * width * 2 + (STAGES * 2 + 2) * slots * width * 2
    sums = rows * (3 * LANES + 2 * width) * 4 + STAGES * tiling["block_q"] * LANES * 4
    return blocks + sums + request.groups * tiling["block_q_compute"] * tiling["block_kv_compute"] * 21


def _bytes_of_decode(request: Request, tiling: Tiling) -> int:
    """Blocks of keys and values; statistics of all rows; queries, results and sums of one."""
    slots = tiling["block_kv"]
    rows = (request.batch + 2) * request.q_heads * LANES * 4
    return staged_bytes(request, slots) + rows + 5 * request.q_heads * round_up(request.head_dim, LANES) * 2


def tilings_of(request: Request) -> tuple[Tiling, ...]:
    """The search space, the default first."""
    if request.page_size is None or request.page_size % LANES:
        return (Tiling(),)
    found = tuple(dict.fromkeys(_of_decode(request) if request.q_len == 1 else _of_chunk(request)))
    limit = vector_limit(request.target)
    return tuple(tiling for tiling in found if vector_bytes(request, tiling) <= limit) or found


def _of_decode(request: Request) -> list[Tiling]:
    sizes = [_whole_pages(request, slots) for slots in _DECODE_SLOTS]
    fitting = [slots for slots in sizes if staged_bytes(request, slots) <= _MOST_STAGED_BYTES]
    return [
        Tiling.of(block_kv=slots, block_kv_compute=_divisor((1024, *_COMPUTED_SLOTS), slots))
        for slots in fitting or [min(sizes)]
    ]


def _of_chunk(request: Request) -> list[Tiling]:
    longest = _WINDOW_SLOTS if left_of(request) is not None else 2048
    queries = min(max(LANES, 1 << (request.q_len - 1).bit_length()), longest)
    found = []
    sizes = [_whole_pages(request, min(slots, longest)) for slots in _CHUNK_SLOTS]
    fitting = [slots for slots in sizes if request.groups * LANES * slots <= _MOST_AREA]
    for slots in fitting or [min(sizes)]:
        block_q = queries
        while block_q > LANES and request.groups * block_q * slots > _MOST_AREA:
            block_q //= 2
        rows = max(_LEAST_ROWS, 1 << (max(1, _COMPUTED_ROWS // request.groups).bit_length() - 1))
        found.append(
            Tiling.of(
                block_q=block_q,
                block_q_compute=min(rows, block_q // 2),
                block_kv=slots,
                block_kv_compute=_divisor(_COMPUTED_SLOTS, slots),
            )
        )
    return found


def _whole_pages(request: Request, slots: int) -> int:
    page_size = page_size_of(request)
    return page_size * min(max(1, slots // page_size), pages_seen(request))


def _divisor(sizes: tuple[int, ...], slots: int) -> int:
    return next(size for size in sizes if slots % size == 0)
