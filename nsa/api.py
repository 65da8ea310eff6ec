"""The public functions: the specification's contract in front of the registered op."""

import torch

from . import op as _op  # noqa: F401  registers torch.ops.nsa
from . import paged as _paged  # noqa: F401  likewise
from .autocast import seen_dtype
from .contract import (
    PUBLIC_DTYPES,
    check_ends,
    check_geometry,
    check_held,
    check_int,
    check_layout,
    check_tensor,
    check_tensors,
)
from .segments import is_plain, known_ends, overload_for, prefix_sums
from .table import count_windows as _count_windows
from .types import AnyInt, Int, Lengths


def nsa_compress(
    input: torch.Tensor,
    weight: torch.Tensor,
    compress_block_size: Int,
    compress_stride: Int,
    *,
    actual_seq_len: Lengths[AnyInt],
    n_windows: Int | None = None,
) -> torch.Tensor:
    """Compress the rows of packed segments: a weighted sum over each sliding window.

        y[w, n, d] = sum_j weight[j, n] * input[start_w + j, n, d]

    In every segment, window i starts i * compress_stride rows after the segment's start and is
    compress_block_size rows long. Windows never cross segments, an incomplete one is dropped, and those of
    all segments stand in order. Sums are kept in fp32 and rounded once. Source of the formula and of the
    errors: mindspore.ops.nsa_compress. Differentiable in input and weight, any number of times.

    Args:
        input: (T, N, D) fp16 or bf16; T rows of N heads of D elements, 1 <= N <= 128, D a multiple of 16 up
            to 256. Need not be contiguous.
        weight: (compress_block_size, N), dtype and device of `input`. Under autocast both go to its dtype first.
        compress_block_size: rows of a window, a multiple of 16 in [16, 128].
        compress_stride: rows between windows, a multiple of 16 in [16, compress_block_size].
        actual_seq_len: tuple or list of ints, where each segment ends, in rows (prefix sums of the segment
            lengths, without a leading 0, the last one T). Equal neighbours are an empty segment. Beyond the
            specification: a 1-D integer numpy array or CPU tensor.
        n_windows: beyond the specification: T', if known. Where a compiler traces and cannot see the values of
            `actual_seq_len`, it then knows the size of the result.

    Returns:
        (T', N, D), contiguous, dtype of `input`; with segment lengths L_i,
        T' = sum_i max(0, 1 + floor((L_i - compress_block_size) / compress_stride)), which may be 0.

    Raises:
        TypeError: input or weight is no Tensor, their dtypes differ or are not fp16 or bf16; an int is
            expected and something else came (a bool is no int, a numpy integer is one).
        RuntimeError: a rank, shape, size or prefix sum that breaks the rules above; input and weight on
            different devices; a device that has no kernel; actual_seq_len on a device; another n_windows than T';
            a sparse or nested tensor; one whose memory was given back.
    """
    check_tensors("input", input, "weight", weight, PUBLIC_DTYPES, seen_dtype)
    if n_windows is not None:
        check_int("n_windows", n_windows)
    compact = is_plain(input)
    block, stride, ends = checked(compress_block_size, compress_stride, actual_seq_len, compact)
    if not (n_windows is None or isinstance(n_windows, torch.SymInt) or torch.compiler.is_compiling()):
        check_held("n_windows", n_windows)
    check_layout("input", input)
    check_layout("weight", weight)
    op = overload_for(torch.ops.nsa.nsa_compress, ends)
    return op(input, weight, block, stride, actual_seq_len=ends, n_windows=n_windows)


def nsa_compress_infer(
    input: torch.Tensor,
    weight: torch.Tensor,
    slot_mapping: torch.Tensor,
    compress_block_size: Int,
    compress_stride: Int,
    page_block_size: Int,
    *,
    block_table: torch.Tensor | None = None,
    actual_seq_len: Lengths[AnyInt] | None = None,
    cache: torch.Tensor,
) -> torch.Tensor:
    """Decode: compress the newest window of each sequence to which a row was added, where that filled the window.

        cache[slot_mapping[b], n, d] = sum_j weight[j, n] * row(b, s - compress_block_size + j)[n, d]

    for each sequence b whose length s = actual_seq_len[b] is compress_block_size and any number of strides; for others
    nothing is written. Row r of a sequence is row r % page_block_size of page block_table[b, r // page_block_size].
    Source of the signature and of the formula: torch_npu.npu_nsa_compress_infer. Not differentiable.

    Args:
        input: (pages, page_block_size, N, D), the keys or the values; on an NPU fp16 or bf16, elsewhere also fp32 and
            fp64; N and D as in `nsa_compress`. Any strides but that of D, which is 1.
        weight: (compress_block_size, N), dtype and device of `input`. Under autocast it goes to that dtype first.
        slot_mapping: (batch,) int32 or int64, on the device of `input`: a row of `cache` for each sequence, all
            different; -1, which nothing is written to, where no window is due.
        compress_block_size, compress_stride: in rows, as in `nsa_compress`.
        page_block_size: rows of a page, a multiple of 16.
        block_table: (batch, pages of a sequence) int32 or int64, on the device of `input`. Entries that no due window
            needs may be anything. Default: each sequence has equally many pages, one behind the other.
        actual_seq_len: length of each sequence, in rows, the new one included; no prefix sums. A tuple or list of
            ints, a 1-D integer numpy array or CPU tensor.
        cache: (slots, N, D), dtype and device of `input`, written in place. Any strides but that of D, which is 1.

    Returns:
        `cache`.

    Raises:
        TypeError, RuntimeError: before anything is written, for what breaks the rules above, and for a tensor that
            needs a gradient. On an accelerator the host does not wait for values of `slot_mapping` and `block_table`:
            a due window whose slot or one of whose pages does not exist is not written there; where two go to one
            slot, either may be there in the end.
    """
    sizes = _sizes(compress_block_size, compress_stride, page_block_size)
    _check_plain(input=input, weight=weight, slot_mapping=slot_mapping, cache=cache)
    if block_table is not None:
        _check_plain(block_table=block_table)
    if actual_seq_len is not None:
        actual_seq_len = prefix_sums(actual_seq_len, is_plain(input))
    op = torch.ops.nsa._compress_infer
    op = op.lengths if isinstance(actual_seq_len, torch.Tensor) else op.default
    op(input, weight, slot_mapping, *sizes, block_table=block_table, actual_seq_len=actual_seq_len, cache=cache)
    return cache


def nsa_compress_append(
    input: torch.Tensor,
    weight: torch.Tensor,
    cache_table: torch.Tensor,
    compress_block_size: Int,
    compress_stride: Int,
    page_block_size: Int,
    *,
    block_table: torch.Tensor,
    seq_len_before: torch.Tensor,
    seq_len_after: torch.Tensor,
    cache: torch.Tensor,
    max_new_rows: Int | None = None,
) -> torch.Tensor:
    """Prefill in chunks, speculation, decode: compress every window that filled while sequences grew.

    Window w of a sequence holds its rows w * compress_stride to w * compress_stride + compress_block_size. It is
    written if seq_len_after[b] rows hold it and seq_len_before[b] rows do not, to row w % P of page
    cache_table[b, w // P] of `cache`, whose pages have P rows. No length is read by the host, and what is launched
    depends on shapes alone, so that a captured graph serves all lengths. A window that filled with rows that were taken
    back is written again when it fills again, with the same bits if its rows are the same.

    Args:
        input, weight, compress_block_size, compress_stride, page_block_size: as in `nsa_compress_infer`.
        cache_table: (batch, pages of a sequence in `cache`) int32 or int64, on the device of `input`.
        block_table: (batch, pages of a sequence) int32 or int64, on the device of `input`.
        seq_len_before, seq_len_after: (batch,) int32 or int64, on the device of `input`: lengths in rows.
        cache: (pages, P, N, D) of any P, dtype and device of `input`, written in place. Any strides but that of D.
        max_new_rows: the most rows that a sequence may have got, if known, as 1 in decode. It says how work is shared
            out on an accelerator, and nothing of what is written.

    Returns:
        `cache`.

    Raises:
        TypeError, RuntimeError: as `nsa_compress_infer`. On an accelerator the host does not wait for values of tables
            and lengths either: a window is not written there if its page in `cache` or one of its pages in `input`
            does not exist.
    """
    sizes = _sizes(compress_block_size, compress_stride, page_block_size)
    _check_plain(
        input=input,
        weight=weight,
        cache_table=cache_table,
        block_table=block_table,
        seq_len_before=seq_len_before,
        seq_len_after=seq_len_after,
        cache=cache,
    )
    if max_new_rows is not None:
        check_int("max_new_rows", max_new_rows)
        check_held("max_new_rows", max_new_rows)
        max_new_rows = int(max_new_rows)
    torch.ops.nsa._compress_append.default(
        input,
        weight,
        cache_table,
        *sizes,
        block_table=block_table,
        seq_len_before=seq_len_before,
        seq_len_after=seq_len_after,
        cache=cache,
        max_new_rows=max_new_rows,
    )
    return cache


def _check_plain(**tensors):
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        check_layout(name, tensor, advice="")


def _sizes(block, stride, page):
    for name, value in (("compress_block_size", block), ("compress_stride", stride), ("page_block_size", page)):
        check_int(name, value)
        check_held(name, value)
    return int(block), int(stride), int(page)


def count_windows(actual_seq_len: Lengths[AnyInt], compress_block_size: Int, compress_stride: Int) -> int:
    """How many windows segments have, T' = sum_i max(0, 1 + floor((L_i - compress_block_size) / compress_stride)).

    Takes and refuses what `nsa_compress` does; a tensor must not be one that a compiler traces.
    """
    block, stride, ends = checked(compress_block_size, compress_stride, actual_seq_len, compact=False)
    check_geometry(block, stride)
    if torch.compiler.is_compiling():  # the op checks what the compiler does not see
        return _count_windows(ends, block, stride)
    known = known_ends(ends)
    if known is not None:
        check_ends(known)
    return _count_windows(ends if known is None else known, block, stride)


def checked(block, stride, actual_seq_len, compact):
    """The geometry for the ops: block, stride and actual_seq_len. Raises the TypeErrors of the specification; what is
    wrong with values, the ops say."""
    check_int("compress_block_size", block)
    check_int("compress_stride", stride)
    ends = prefix_sums(actual_seq_len, compact)
    block, stride = int(block), int(stride)
    check_held("compress_block_size", block)
    check_held("compress_stride", stride)
    return block, stride, ends
