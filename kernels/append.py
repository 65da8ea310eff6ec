"""Decode and prefill: the windows that filled while sequences grew, read from pages and written to a paged cache.

    cache[slot of window w of sequence b, n, d] = sum_j weight[j, n] * row(b, w * stride + j)[n, d]

for every window w that sequence b has with `after[b]` rows and had not with `before[b]`. Row r of sequence b is row
r % page of page table[b, r // page]. Block and stride are multiples of 16, and so is a page: 16 rows that start at a
multiple of 16 lie in one page, one behind the other. Sums are made so many taps at a time, in their order, whatever the
pages are and however the sequence grew: so a window has the same bits each time that it is written.

The grid depends on sizes alone, never on lengths, and no length is read by the host: a captured graph serves them all.
A program has a column, as in the vector family, and a lane. The lanes share out the sequences or, where one may fill
many windows, `n_splits` lanes share the windows of each. A lane whose sequences fill none reads two lengths of each.

Values in `table` and `slots` are not checked by the host. A window of which a page or the slot is none is not written.
"""

import triton
import triton.language as tl

from .tiles import page_block
from .vector import acc_of

ENDLESS = 2**30  # rows of a page, more than there are windows
MOST = 2**31 - 1  # that 32 bits hold


@triton.jit
def count_windows(lengths, i, n_rows, stride, BLOCK: tl.constexpr):
    """How many windows length i makes, which counts as 0 if it is less, and as n_rows if it is more."""
    length = tl.maximum(tl.minimum(tl.load(lengths + i), n_rows), 0).to(tl.int32)
    return tl.maximum(length - BLOCK + stride, 0) // stride


@triton.jit
def table_entry(table, i, i_column, width, n):
    """Entry (i, i_column) of a table (.., width) of numbers of [0, n); and 1 if it is one, else 0 in place of both."""
    entry = tl.load(table + tl.cast(i, tl.int64) * width + tl.minimum(i_column, width - 1)).to(tl.int64)
    is_one = (i_column < width) & (entry >= 0) & (entry < n)
    return tl.where(is_one, entry, 0), is_one.to(tl.int32)


@triton.jit(
    do_not_specialize=[
        *("table", "before", "after", "slots", "n_pages", "n_cache_pages"),
        *("batch", "table_width", "slots_width", "n_each", "n_lanes", "n_splits", "n_programs"),
    ]
)
def append_vector_kernel(
    x,  # (n_pages, page, N, D), rows ROW apart and heads HEAD
    weight,  # (BLOCK, N)
    table,  # (batch, table_width)
    before,  # (batch,)
    after,  # (batch,)
    slots,  # (batch, slots_width): pages of the cache
    cache,  # (n_cache_pages, cache_page, N, D), heads CACHE_HEAD apart
    page_stride,  # in elements, as the next two
    cache_page_stride,
    cache_row_stride,
    page,  # rows
    cache_page,
    stride,
    n_pages,
    n_cache_pages,
    batch,
    table_width,
    slots_width,
    n_each,  # sequences of a lane, neighbours, so that few lines of `before` and `after` are loaded
    n_lanes,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    ROW: tl.constexpr,
    HEAD: tl.constexpr,
    CACHE_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    i_lane = tl.program_id(0) % n_lanes
    o_j = tl.arange(0, BJ)
    for i_column in range(tl.program_id(0) // n_lanes, (N // BN) * (D // BD), n_programs // n_lanes):
        o_n = i_column // (D // BD) * BN + tl.arange(0, BN)
        o_d = i_column % (D // BD) * BD + tl.arange(0, BD)
        o_x = o_j[:, None, None] * ROW + o_n[None, :, None] * HEAD + o_d[None, None, :]  # [BJ, BN, BD]
        first_b = i_lane // n_splits * n_each
        for i_b in range(first_b, tl.minimum(first_b + n_each, batch)):
            first = count_windows(before, i_b, table_width * page, stride, BLOCK)
            end = count_windows(after, i_b, table_width * page, stride, BLOCK)
            # who has the first window differs from sequence to sequence
            for i_w in range(first + (i_lane + i_b) % n_splits, end, n_splits):
                i_slot, is_legal = table_entry(slots, i_b, i_w // cache_page, slots_width, n_cache_pages)
                b_y = tl.zeros([BN, BD], ACC)
                for j in range(0, BLOCK, BJ):
                    row = i_w * stride + j
                    i_stretch = row // page
                    i_page, is_page = table_entry(table, i_b, i_stretch, table_width, n_pages)
                    is_legal = is_legal & is_page
                    i_row = row - tl.cast(i_stretch, tl.int64) * page
                    b_x = tl.load(x + i_page * page_stride + i_row * ROW + o_x)  # [BJ, BN, BD]
                    b_w = tl.load(weight + (j + o_j)[:, None] * N + o_n[None, :]).to(ACC)  # [BJ, BN]
                    b_y += tl.sum(b_x.to(ACC) * b_w[:, :, None], 0)
                if is_legal > 0:
                    i_row = tl.cast(i_w % cache_page, tl.int64)
                    p_y = cache + i_slot * cache_page_stride + i_row * cache_row_stride
                    o_y = o_n[:, None] * CACHE_HEAD + o_d[None, :]  # [BN, BD]
                    tl.store(p_y + o_y, b_y.to(cache.dtype.element_ty))


def append(x, weight, table, before, after, slots, cache, stride, most_windows, n_programs):
    """Write to `cache` (pages, page, N, D) what filled in `x` (pages, page, N, D); see above for the others.

    `slots` (batch, width) has pages of the cache for the windows of each sequence; `slots` (batch,) has one page for
    each, to whose first row every window goes. most_windows: so many a sequence may fill, which says how work is shared
    out, and no more. RuntimeError for strides and tables with which a sum of 32 bits would overflow in the kernel.
    """
    (block, n), d, batch = weight.shape, x.shape[3], table.shape[0]
    sizes = page_block(n, d, x.element_size())
    columns = (n // sizes["BN"]) * (d // sizes["BD"])
    check_reach(x, table, cache)
    n_lanes, n_splits, n_programs = shares(batch, most_windows, columns, n_programs)
    # of a page for each sequence every row is the first
    slots_width, cache_page, cache_row_stride = (
        (slots.shape[1], cache.shape[1], cache.stride(1)) if slots.ndim == 2 else (1, ENDLESS, 0)
    )
    append_vector_kernel[(n_programs,)](
        x,
        weight,
        table,
        before,
        after,
        slots,
        cache,
        x.stride(0),
        cache.stride(0),
        cache_row_stride,
        x.shape[1],
        cache_page,
        stride,
        x.shape[0],
        cache.shape[0],
        batch,
        table.shape[1],
        slots_width,
        triton.cdiv(batch, n_lanes // n_splits),
        n_lanes,
        n_splits,
        n_programs,
        N=n,
        D=d,
        ROW=x.stride(1),
        HEAD=x.stride(2),
        CACHE_HEAD=cache.stride(2),
        BLOCK=block,
        **sizes,
        ACC=acc_of(x),
    )


def check_reach(x, table, cache):
    """RuntimeError where an offset that the kernel keeps in 32 bits would need more."""
    (n, d), (_, row, head, _) = x.shape[2:], x.stride()
    for what, reach in (
        ("16 rows of input must lie within {} elements", 15 * row + (n - 1) * head + d),
        ("a row of cache must lie within {} elements", (n - 1) * cache.stride(2) + d),
        ("block_table must have pages for at most {} rows of a sequence", table.shape[1] * x.shape[1]),
    ):
        if reach > MOST:
            raise RuntimeError(f"{what.format(MOST)} on {x.device}, got {reach}")


def shares(batch, most_windows, columns, n_programs):
    """(lanes, lanes that share a sequence's windows, programs), by which no program has nothing to do where that can be
    known.

    Example: 40 programs and 2 columns make 20 lanes. For 64 sequences that fill a window each, every lane has 3 or 4
    sequences; for 3 that may fill 512, all lanes share the windows of each.
    """
    most_lanes = max(n_programs // columns, 1)
    n_splits = min(most_windows, most_lanes)
    n_lanes = n_splits * min(most_lanes // n_splits, batch)
    return n_lanes, n_splits, n_lanes * min(n_programs // n_lanes, columns)
