"""The public functions: the specification's contract in front of the registered op."""

import torch

from . import op as _op  # noqa: F401  registers torch.ops.nsa
from .autocast import seen_dtype
from .contract import PUBLIC_DTYPES, check_ends, check_geometry, check_held, check_int, check_layout, check_tensors
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
