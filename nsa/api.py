"""The public function: the specification's contract in front of the registered op."""

import torch

from . import op as _op  # noqa: F401  registers torch.ops.nsa
from .contract import PUBLIC_DTYPES, check_compress


def nsa_compress(input, weight, compress_block_size, compress_stride, *, actual_seq_len):
    """Compress the rows of packed segments: a weighted sum over each sliding window.

        y[w, n, d] = sum_j weight[j, n] * input[start_w + j, n, d]

    In every segment, window i starts i * compress_stride rows after the segment's start and is
    compress_block_size rows long. Windows never cross segments, an incomplete one is dropped, and those of
    all segments stand in order. Sums are kept in fp32 and rounded once. Source of the formula and of the
    errors: mindspore.ops.nsa_compress. Differentiable in input and weight, any number of times.

    Args:
        input: (T, N, D) fp16 or bf16; T rows of N heads of D elements, 1 <= N <= 128, D a multiple of 16 up
            to 256. Need not be contiguous.
        weight: (compress_block_size, N), dtype and device of `input`.
        compress_block_size: rows of a window, a multiple of 16 in [16, 128].
        compress_stride: rows between windows, a multiple of 16 in [16, compress_block_size].
        actual_seq_len: tuple or list of ints, where each segment ends, in rows (prefix sums of the segment
            lengths, without a leading 0, the last one T). Equal neighbours are an empty segment.

    Returns:
        (T', N, D), contiguous, dtype of `input`; with segment lengths L_i,
        T' = sum_i max(0, 1 + floor((L_i - compress_block_size) / compress_stride)), which may be 0.

    Raises:
        TypeError: input or weight is no Tensor, their dtypes differ or are not fp16 or bf16; an int is
            expected and something else came (a bool is no int, a numpy integer is one).
        RuntimeError: a rank, shape, size or prefix sum that breaks the rules above; input and weight on
            different devices; a device that has no kernel.
    """
    check_compress(input, weight, compress_block_size, compress_stride, actual_seq_len, PUBLIC_DTYPES)
    return torch.ops.nsa.nsa_compress.default(
        input,
        weight,
        int(compress_block_size),
        int(compress_stride),
        actual_seq_len=[int(end) for end in actual_seq_len],
    )
