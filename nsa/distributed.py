"""Context parallel: the packed rows are cut across the ranks of a process group, each of which computes its windows.

A rank owns the windows whose first row it holds. Those that lie within its rows are its *inner* windows. The *cut*
windows begin in its last rows, the *tail*, and end in rows of the ranks behind it, the *halo*, which is fetched by one
all-to-all. A rank's inner windows come before its cut windows, and ranks in order: so the ranks' results, one after the
other, are the result of one process. docs/context_parallel.md has a drawing.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

from .api import checked
from .autocast import seen_dtype
from .contract import PUBLIC_DTYPES, WIDE_DTYPES, check_device, check_tensors, is_int
from .segments import known_ends
from .table import count_windows

__all__ = ["context_parallel_nsa_compress", "windows_per_rank"]


def context_parallel_nsa_compress(
    input, weight, compress_block_size, compress_stride, *, actual_seq_len, group=None, rows_per_rank=None
):
    """`nsa.nsa_compress` of rows that are cut across the ranks of `group`, anywhere: within a segment, within a window.

    Each rank holds a contiguous slice of the T packed rows, in rank order, and gets the windows whose first row it
    holds; `windows_per_rank` says how many. Example: block 32, stride 16, one segment of 96 rows, whose windows start
    at rows 0, 16, 32, 48 and 64; 48 rows on each of two ranks. Rank 0 gets windows 0, 1 and 2 and fetches 16 rows for
    the last of them, rank 1 gets windows 3 and 4 and fetches nothing.

    All ranks of the group must call it, with the same sizes, `actual_seq_len` and `rows_per_rank`, and all or none with
    gradients wanted of `input`, of `weight`; likewise all must take part in the backward, also those that have no
    window or no row. Nothing else is agreed on between ranks: an error that one rank alone raises leaves the others
    waiting for it until the group's timeout.

    Differentiable in input and weight, any number of times. The gradient of `input` is whole: fetched rows send theirs
    back to their owner. The gradient of `weight` is this rank's part of it, that of its windows: as for every parameter
    of which each rank has a copy, the parts must be summed over the group.

    Args:
        input: (rows of this rank, N, D), fp16, bf16, and off the NPU fp32 and fp64; else as for `nsa.nsa_compress`. May
            have zero rows.
        weight: (compress_block_size, N), the same on all ranks; dtype and device of `input`.
        compress_block_size: rows of a window, as for `nsa.nsa_compress`.
        compress_stride: rows between windows, as for `nsa.nsa_compress`.
        actual_seq_len: where each segment ends, in rows of all ranks together, in every form that `nsa.nsa_compress`
            takes; the last one T.
        group: a ProcessGroup that this process is in; None is the default group.
        rows_per_rank: tuple or list of ints, how many rows each rank of the group holds, 0 or more; None: all as many.

    Returns:
        (windows of this rank, N, D), contiguous, dtype of `input`. Put one after the other in rank order, they are what
        `nsa.nsa_compress` makes of all rows.

    Under autocast, `input` and `weight` are cast to its dtype, except from fp64.

    Raises:
        TypeError, RuntimeError: as `nsa.nsa_compress`, with T the rows of all ranks.
        TypeError: group is no ProcessGroup; rows_per_rank is no tuple or list of ints.
        RuntimeError: torch.distributed is not initialised; this process is not in the group; rows_per_rank has another
            length than the group, a negative element, or another sum than T; without it, T rows cannot be split evenly;
            input has another number of rows than this rank should hold.
    """
    block, stride, ends = _checked(input, weight, compress_block_size, compress_stride, actual_seq_len)
    input, weight = (tensor.to(seen_dtype(tensor)) for tensor in (input, weight))
    group, rank, world = _place(group)
    rows = _rows(rows_per_rank, ends[-1], world)
    if input.shape[0] != rows[rank]:
        raise RuntimeError(f"input must have the {rows[rank]} rows of rank {rank} of {world}, got {input.shape[0]}")
    y, _ = _Compress.apply(input, weight, block, stride, _share(group, rank, rows, ends, block, stride))
    return y


def windows_per_rank(rows_per_rank, compress_block_size, compress_stride, *, actual_seq_len):
    """How many windows each rank gets from `context_parallel_nsa_compress`, as a list: what is needed to gather them.

    Needs no process group. Arguments and errors are those of `context_parallel_nsa_compress`.
    """
    tap = torch.empty(())
    n_taps = compress_block_size if _is_positive(compress_block_size) else 1  # if not, the contract says so
    one = tap.expand(1, 1, 16), tap.expand(n_taps, 1)
    block, stride, ends = _checked(*one, compress_block_size, compress_stride, actual_seq_len)
    rows = _checked_rows(rows_per_rank, ends[-1])
    counts = []
    for begin, end in _slices(rows):
        first, stop = _cut_windows(begin, end, ends, block, stride)
        segments = [_inner_ends(begin, end, ends, stride), [stop - first]]
        counts.append(sum(count_windows(s, block, stride) for s in segments if s and s[-1]))
    return counts


class Share(NamedTuple):
    """What one rank computes and exchanges."""

    inner_ends: list  # prefix sums of segments of its rows, whose windows are its inner windows; empty without rows
    n_tail: int  # tail and halo together are one segment, whose windows are its cut windows
    sent: list  # to each rank: so many rows, the first that this rank has
    received: list  # from each rank: so many rows, which together are the halo
    group_name: str | None  # None if no rank has a halo


def _share(group, rank, rows, ends, block, stride):
    slices = _slices(rows)
    begin, end = slices[rank]
    cut = [_cut_windows(*rows_of, ends, block, stride) for rows_of in slices]
    halos = [(last, stop) for (_, last), (_, stop) in zip(slices, cut)]
    return Share(
        inner_ends=_inner_ends(begin, end, ends, stride),
        n_tail=end - cut[rank][0],
        sent=[_common(halo, slices[rank]) for halo in halos],
        received=[_common(halos[rank], rows_of) for rows_of in slices],
        group_name=group.group_name if any(last < stop for last, stop in halos) else None,
    )


def _slices(rows):
    """The first row of each rank, and one past its last."""
    ends = list(accumulate(rows))
    return [(end - n, end) for end, n in zip(ends, rows)]


def _common(a, b):
    """How many rows two slices have in common."""
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def _cut_windows(begin, end, ends, block, stride):
    """For a rank with rows begin to end: the first row of its cut windows and one past their last; twice `end` if there
    are none. All of them are in the segment that holds both the rank's last row and the next one."""
    i = _segment_of(end, ends)
    if i == len(ends):
        return end, end
    segment = ends[i - 1] if i else 0
    first = -(-(max(begin, end - block + 1, segment) - segment) // stride)
    last = min(end - 1 - segment, ends[i] - block - segment) // stride
    return (segment + first * stride, segment + last * stride + block) if first <= last else (end, end)


def _inner_ends(begin, end, ends, stride):
    """For a rank with rows begin to end: prefix sums that cut these rows into segments with its inner windows. In a
    segment that begins on an earlier rank, the rows up to the next window are a segment of their own: fewer than a
    stride, and so than a block, they have no window."""
    if begin == end:
        return []
    i, j = _segment_of(begin, ends), _segment_of(end - 1, ends)
    local = [segment_end - begin for segment_end in (*ends[i:j], end)]
    lead = ((ends[i - 1] if i else 0) - begin) % stride
    return [lead, *local] if 0 < lead < local[0] else local


def _segment_of(row, ends):
    """The index of the segment that holds a row; one past the last segment for T. As `bisect.bisect_right`, which
    torch.compile does not trace."""
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ends[middle] > row else (middle + 1, high)
    return low


class _Compress(torch.autograd.Function):
    """The windows of this rank, and its edge, which is tail and halo. The edge is a result too, so that what the
    weight's gradient keeps of other ranks' rows has a gradient itself.

    Every rank makes the same graph of operations, whichever rows and windows it has: so the backward of an exchange, of
    any order, is reached on all ranks or on none, and in the same order on all.
    """

    @staticmethod
    def forward(ctx, input, weight, block, stride, share):
        geometry = (block, stride)
        heads = torch.cat([input[:0], *(input[:n] for n in share.sent if n)])
        halo = _exchange(heads, share.received, share.sent, share.group_name)
        inner = _compress(input, weight, geometry, share.inner_ends)  # while the halo is on its way
        edge = torch.cat([input[len(input) - share.n_tail :], halo])
        cut = _compress(edge, weight, geometry, _one_segment(edge))
        input_wanted, weight_wanted, *_ = ctx.needs_input_grad
        kept = input if weight_wanted else None, edge if weight_wanted else None, weight if input_wanted else None
        ctx.save_for_backward(*kept)
        ctx.geometry, ctx.share, ctx.n_inner = geometry, share, len(inner)
        return torch.cat([inner, cut]), edge

    @staticmethod
    def backward(ctx, g, g_edge):
        input, edge, weight = ctx.saved_tensors
        share, geometry = ctx.share, ctx.geometry
        g_inner, g_cut = g[: ctx.n_inner], g[ctx.n_inner :]
        d_input = d_weight = None
        if ctx.needs_input_grad[0]:
            d_edge = _grad_rows(g_cut, weight, geometry, _one_segment(g_edge)) + g_edge
            returned = _exchange(d_edge[share.n_tail :], share.sent, share.received, share.group_name)
            d_input = _grad_rows(g_inner, weight, geometry, share.inner_ends)  # while they are on their way
            if len(d_input):
                d_input[len(d_input) - share.n_tail :] += d_edge[: share.n_tail]
                parts = [part for part in returned.split(share.sent) if len(part)]
                for part in parts or [returned]:  # of no rows: but it keeps the exchange in the graph
                    d_input[: len(part)] += part
            else:  # no rows either: added in place, their gradient would not be differentiable
                d_input = d_input + d_edge + returned
        if ctx.needs_input_grad[1]:
            d_weight = _grad_weight(g_inner, input, geometry, share.inner_ends)
            d_weight = d_weight + _grad_weight(g_cut, edge, geometry, _one_segment(edge))
        return d_input, d_weight, None, None, None


class _Exchange(torch.autograd.Function):
    """An all-to-all, whose gradient is the one that goes back."""

    @staticmethod
    def forward(ctx, rows, received, sent, group_name):
        ctx.back = sent, received, group_name
        return collectives.all_to_all_single(rows.contiguous(), received, sent, group_name)

    @staticmethod
    def backward(ctx, g):
        return _Exchange.apply(g, *ctx.back), None, None, None


def _exchange(rows, received, sent, group_name):
    return rows if group_name is None else _Exchange.apply(rows, received, sent, group_name)


def _one_segment(rows):
    return [len(rows)] if len(rows) else []


# The registered ops, which take at least one row. Of none, the result has the same shape and is as much a function of
# both factors.


def _compress(rows, weight, geometry, ends):
    if not ends:
        return rows * weight[:1, :, None]
    return torch.ops.nsa.nsa_compress.default(rows, weight, *geometry, actual_seq_len=ends)


def _grad_rows(g, weight, geometry, ends):
    if not ends:
        return g * weight[:1, :, None]
    return torch.ops.nsa.nsa_compress_grad_input.default(g, weight, *geometry, actual_seq_len=ends)


def _grad_weight(g, rows, geometry, ends):
    if not ends:
        return (g * rows).sum((0, 2)).expand(geometry[0], -1)
    return torch.ops.nsa.nsa_compress_grad_weight.default(g, rows, *geometry, actual_seq_len=ends)


def _checked(input, weight, block, stride, actual_seq_len):
    """Block, stride and the list of all ends, after the checks of `nsa.nsa_compress` but for those of T."""
    on_npu = isinstance(input, torch.Tensor) and input.device.type == "npu"
    dtypes = PUBLIC_DTYPES if on_npu else WIDE_DTYPES
    check_tensors("input", input, "weight", weight, dtypes, seen_dtype)
    block, stride, ends = checked(block, stride, actual_seq_len, compact=False)
    if isinstance(ends, torch.Tensor):
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "in a compiled graph actual_seq_len must be a tuple or list of ints, got a tensor or array"
            )
        ends = known_ends(ends).tolist()
    if not all(type(end) is int for end in ends):
        raise RuntimeError("actual_seq_len must hold ints that are constant in a compiled graph, got symbolic ones")
    # of all ranks' rows, without memory
    whole = torch.empty(input.shape, dtype=seen_dtype(input), device="meta")
    if input.ndim == 3:
        whole = whole.new_empty(()).expand(max([1, *ends[-1:]]), *input.shape[1:])
    taps = torch.empty(weight.shape, dtype=whole.dtype, device="meta")
    torch.ops.nsa.nsa_compress.default(whole, taps, block, stride, actual_seq_len=ends)
    check_device("input", input, "weight", weight)
    return block, stride, ends


def _is_positive(value):
    return is_int(type(value)) and value > 0


def _place(group):
    """The group, this process's rank in it, and its size."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("torch.distributed must be initialised (init_process_group), got no process group")
    group = dist.group.WORLD if group is None else group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError("this process must be in the group, got a group without it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}")
    return group, dist.get_rank(group), dist.get_world_size(group)


def _rows(rows_per_rank, t, world):
    """The rows of each rank."""
    if rows_per_rank is None:
        if t % world:
            raise RuntimeError(
                f"without rows_per_rank, T must be a multiple of the {world} ranks of the group, got T = {t}"
            )
        return [t // world] * world
    rows = _checked_rows(rows_per_rank, t)
    if len(rows) != world:
        raise RuntimeError(f"rows_per_rank must have an element for each of the {world} ranks, got {len(rows)}")
    return rows


def _checked_rows(rows_per_rank, t):
    if not isinstance(rows_per_rank, (tuple, list)):
        raise TypeError(f"rows_per_rank must be a tuple or list of ints, got {type(rows_per_rank).__name__}")
    for n in rows_per_rank:
        if not is_int(type(n)):
            raise TypeError(f"rows_per_rank must be a tuple or list of ints, got an element of type {type(n).__name__}")
        if n < 0:
            raise RuntimeError(f"rows_per_rank must not be negative, got {n}")
    rows = [int(n) for n in rows_per_rank]
    if sum(rows) != t:
        raise RuntimeError(f"rows_per_rank must add up to T = actual_seq_len[-1] = {t}, got {sum(rows)}")
    return rows
