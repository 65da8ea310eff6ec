"""The window-offset table: where the windows of packed segments start, and which windows hold a row.

Block and stride are multiples of 16, so 16 rows that start a multiple of 16 after their segment's start
lie in a window all together or not at all: such a *row group* is the unit in which dInput is gathered.
"""

from functools import cached_property, lru_cache

import numpy as np
import torch

GROUP = 16  # rows of a row group


def count_windows(actual_seq_len, block, stride):
    """T' = sum_i max(0, 1 + floor((L_i - block) / stride)), for ints and for symbolic ints."""
    if all(type(end) is int for end in actual_seq_len):
        return int(_windows_per_segment(_lengths(actual_seq_len)[1], block, stride).sum())
    total, begin = 0, 0
    for end in actual_seq_len:
        total += torch.sym_max(0, 1 + (end - begin - block) // stride)
        begin = end
    return total


@lru_cache(maxsize=64)
def window_table(actual_seq_len, block, stride, device):
    """The `WindowTable` of checked, plain ints; the 64 used last are kept."""
    return WindowTable(actual_seq_len, block, stride, device)


class WindowTable:
    """Offsets of one (actual_seq_len, block, stride) on one device, computed as they are asked for, with no
    loop over segments. Rows and windows are counted over all segments; every table is int64."""

    def __init__(self, actual_seq_len, block, stride, device):
        self.block, self.stride, self.device = block, stride, device
        self._begins, self._lengths = _lengths(actual_seq_len)
        self._counts = _windows_per_segment(self._lengths, block, stride)
        self._first_window = np.cumsum(self._counts) - self._counts
        self.n_windows = int(self._counts.sum())
        self._tiles = {}

    @cached_property
    def begins(self):
        """(2, segments + 1): the first row of each segment, and its first window; at the end, how many there are."""
        rows = np.append(self._begins, self._begins[-1] + self._lengths[-1])
        return self._to_device([rows, np.append(self._first_window, self.n_windows)]).t().contiguous()

    @cached_property
    def starts(self):
        """(T',): first row of each window."""
        segment, i_window = _spread(self._counts)
        return self._to_device([self._begins[segment] + i_window * self.stride])[:, 0]

    @cached_property
    def groups(self):
        """(n_groups, 5), a line for each row group: first row, number of rows (16, or less at a segment's end),
        first window that holds it, one past the last such window, tap of its first row in that first
        window (in the next window, the tap is a stride less)."""
        segment, i_group = _spread(-(-self._lengths // GROUP))
        offset = i_group * GROUP  # of the group in its segment
        # window i holds the group if i * stride <= offset and offset + GROUP <= i * stride + block
        first = np.maximum(-(-(offset + GROUP - self.block) // self.stride), 0)
        end = np.minimum(offset // self.stride + 1, self._counts[segment])
        end = np.maximum(first, end)  # rows behind the last window: none
        n_rows = np.minimum(self._lengths[segment] - offset, GROUP)
        first_window = self._first_window[segment]
        tap = offset - first * self.stride
        return self._to_device([self._begins[segment] + offset, n_rows, first_window + first, first_window + end, tap])

    def window_tiles(self, windows):
        """(n_tiles, 4), a line for each run of up to `windows` windows of one segment: first row, rows from
        there to the end of the last window, first window, number of windows. Runs of most rows come first, so
        that programs that take turns at them get equal work."""
        if ("windows", windows) not in self._tiles:
            segment, i_tile = _spread(-(-self._counts // windows))
            first = i_tile * windows
            count = np.minimum(self._counts[segment] - first, windows)
            n_rows = (count - 1) * self.stride + self.block
            row = self._begins[segment] + first * self.stride
            columns = [row, n_rows, self._first_window[segment] + first, count]
            self._tiles["windows", windows] = self._to_device(_most_rows_first(columns))
        return self._tiles["windows", windows]

    def row_tiles(self, rows):
        """(n_tiles, 6), a line for each run of up to `rows` rows of one segment, `rows` a multiple of the stride:
        first row, number of rows, window of slot 0, first slot and one past the last slot whose window
        exists, first row group. The window in slot v starts (v - lead) strides after the run, with
        lead = ceil(block / stride) - 1, so that the slots are all windows that can hold one of the rows.
        Runs of most rows come first."""
        if ("rows", rows) not in self._tiles:
            segment, i_tile = _spread(-(-self._lengths // rows))
            offset = i_tile * rows
            lead = -(-self.block // self.stride) - 1
            slots = rows // self.stride + lead
            slot_0 = offset // self.stride - lead  # counted in its segment, may be negative
            first = np.minimum(np.maximum(-slot_0, 0), slots)
            end = np.maximum(np.minimum(self._counts[segment] - slot_0, slots), first)
            groups = -(-self._lengths // GROUP)
            columns = [
                self._begins[segment] + offset,
                np.minimum(self._lengths[segment] - offset, rows),
                self._first_window[segment] + slot_0,
                first,
                end,
                (np.cumsum(groups) - groups)[segment] + offset // GROUP,
            ]
            self._tiles["rows", rows] = self._to_device(_most_rows_first(columns))
        return self._tiles["rows", rows]

    def _to_device(self, columns):
        return torch.from_numpy(np.stack(columns, axis=1)).to(self.device)


def _most_rows_first(columns):
    """Lines (first row, rows, ...) sorted by rows; those of equal rows stay in order, next to their neighbours."""
    order = np.argsort(-columns[1].astype(np.int16), kind="stable")  # of 16 bits: a radix sort; tiles are that small
    return [column[order] for column in columns]


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
