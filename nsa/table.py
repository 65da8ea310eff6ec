"""The window-offset table: where the windows of packed segments start, and which windows hold a row.

Block and stride are multiples of 16, so 16 rows that start a multiple of 16 after their segment's start
lie in a window all together or not at all: such a *row group* is the unit in which dInput is gathered.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

GROUP = 16  # rows of a row group


class WindowTable(NamedTuple):
    """Offsets of one (actual_seq_len, block, stride), on one device. Rows and windows are counted globally."""

    starts: torch.Tensor
    """(T',) int64: first row of each window"""
    groups: torch.Tensor
    """(n_groups, 5) int64, a line for each row group: first row, number of rows (16, or less at a segment's
    end), first window that holds it, one past the last such window, tap of its first row in that first window
    (in the next one, the tap is a stride less)"""


def count_windows(actual_seq_len, block, stride):
    """T' = sum_i max(0, 1 + floor((L_i - block) / stride)), for ints and for symbolic ints."""
    if all(type(end) is int for end in actual_seq_len):
        return int(_windows_per_segment(_lengths(actual_seq_len)[1], block, stride).sum())
    total, begin = 0, 0
    for end in actual_seq_len:
        total += torch.sym_max(0, 1 + (end - begin - block) // stride)
        begin = end
    return total


def window_table(actual_seq_len, block, stride, device):
    """The table of checked, plain ints, kept for the 64 combinations used last."""
    return _cached_table(tuple(actual_seq_len), block, stride, device)


@lru_cache(maxsize=64)
def _cached_table(actual_seq_len, block, stride, device):
    starts, groups = build_table(actual_seq_len, block, stride)
    return WindowTable(torch.from_numpy(starts).to(device), torch.from_numpy(groups).to(device))


def build_table(actual_seq_len, block, stride):
    """(starts, groups) of `WindowTable` as numpy arrays; no loop over segments."""
    begins, lengths = _lengths(actual_seq_len)
    n_windows = _windows_per_segment(lengths, block, stride)
    first_window = np.cumsum(n_windows) - n_windows

    segment, i_window = _spread(n_windows)
    starts = begins[segment] + i_window * stride

    segment, i_group = _spread(-(-lengths // GROUP))
    offset = i_group * GROUP  # of the group in its segment
    # window i holds the group if i * stride <= offset and offset + GROUP <= i * stride + block
    first = np.maximum(-(-(offset + GROUP - block) // stride), 0)
    end = np.minimum(offset // stride + 1, n_windows[segment])
    end = np.maximum(first, end)  # rows behind the last window: none
    groups = np.stack(
        [
            begins[segment] + offset,
            np.minimum(lengths[segment] - offset, GROUP),
            first_window[segment] + first,
            first_window[segment] + end,
            offset - first * stride,
        ],
        axis=1,
    )
    return starts, groups


def _lengths(actual_seq_len):
    """Begin and length of each segment."""
    ends = np.array(actual_seq_len, dtype=np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    return begins, ends - begins


def _windows_per_segment(lengths, block, stride):
    return np.maximum(0, 1 + (lengths - block) // stride)


def _spread(counts):
    """For counts (2, 0, 3): owner (0, 0, 2, 2, 2) and position in it (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
