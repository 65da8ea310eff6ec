"""The specification as a few lines of eager PyTorch: slow, differentiable, and obviously right."""

from collections.abc import Sequence
from itertools import pairwise

import torch


def nsa_compress(
    input: torch.Tensor,
    weight: torch.Tensor,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: Sequence[int],
) -> torch.Tensor:
    """y[w, n, d] = sum_j weight[j, n] * input[start_w + j, n, d], summed in fp32 (fp64 for fp64 inputs).

    Same signature, shapes and units as `nsa.nsa_compress`; checks nothing.
    """
    block, stride = compress_block_size, compress_stride
    # in every segment, a window each `stride` rows for as long as a whole block fits
    starts = [s for begin, end in pairwise((0, *actual_seq_len)) for s in range(begin, end - block + 1, stride)]
    rows = torch.tensor(starts, dtype=torch.long, device=input.device)[:, None] + torch.arange(
        block, device=input.device
    )  # [T', block]
    acc = torch.promote_types(input.dtype, torch.float32)
    windows = input[rows].to(acc)  # [T', block, N, D]
    return torch.einsum("jn,wjnd->wnd", weight.to(acc), windows).to(input.dtype)
