"""The window-offset table: where the windows of packed segments start, and which windows hold a row.

Block and stride are multiples of 16, so 16 rows that start a multiple of 16 after their segment's start
lie in a window all together or not at all: such a *row group* is the unit in which dInput is gathered.
"""

import os
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .contract import check_ends
from .transfer import Transfer

GROUP = 16  # rows of a row group
EXPRESSED = 8  # segments: for more, T' as an expression of symbolic lengths would cost PyTorch's compiler seconds
HOSTS = ("cpu", "meta")  # types of devices whose tables need no transfer


class RowGroup(NamedTuple):
    """A line of `WindowTable.groups`, or the table's columns. `kernels/lines.py` reads lines in this order.

    Block 32, stride 16, a segment of 90 rows from row 0 on: rows 48 to 63 are held by windows 2 and 3 (from rows 32
    and 48 on). The group is (48, 16, 2, 4, 16): row 48 is tap 16 of window 2, and a stride less, tap 0, of window 3.
    """

    row: object  # the group's first row
    n_rows: object  # 16, or less at the end of a segment
    first: object  # the first window that holds the group
    end: object  # one past the last window that holds it; equal to `first` where none does
    tap: object  # of the group's first row in the first window; a stride less in each following window


class WindowRun(NamedTuple):
    """A line of `WindowTable.window_runs`, or the table's columns: windows of one segment that follow each other.
    Drawn in `kernels/cube.py`; `kernels/lines.py` reads lines in this order."""

    row: object  # the first row of the first window
    n_rows: object  # from there to the end of the last window
    window: object  # the first window
    n_windows: object


class RowRun(NamedTuple):
    """A line of `WindowTable.row_runs`, or the table's columns: rows of one segment that follow each other, and slots
    for all windows that can hold one of them. The window in slot v starts (v - lead) strides after the run's first
    row, with lead = ceil(block / stride) - 1. Drawn in `kernels/cube.py`; `kernels/lines.py` reads lines in this
    order."""

    row: object  # the first row
    n_rows: object
    window: object  # in slot 0; counted on past the segment's ends, so it may be none of the segment's
    first: object  # the first slot whose window exists
    end: object  # one past the last slot whose window exists
    group: object  # the row group that starts where the run does


def count_windows(ends, block, stride):
    """T' = sum_i max(0, 1 + floor((L_i - block) / stride)), of prefix sums in an array or ints, symbolic ones too."""
    if isinstance(ends, np.ndarray):
        return int(windows_per_segment(_lengths(ends)[1], block, stride).sum())
    total, begin = 0, 0
    for end in ends:
        total += torch.sym_max(0, 1 + (end - begin - block) // stride)
        begin = end
    return total


def window_table(ends: npt.ArrayLike, block: int, stride: int, device: torch.device) -> "WindowTable":
    """The `WindowTable` of prefix sums, which are checked; the 64 used last are kept. A device without an index is the
    current one of its type, so that "cuda" and "cuda:0" share a table."""
    if device.index is None and device.type not in HOSTS:
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    return _kept_table(np.asarray(ends, dtype=np.int64).tobytes(), block, stride, device)


class WindowTable:
    """Offsets of one (ends, block, stride) on one device, in parts that are computed when they are first
    asked for, with no loop over segments. Rows and windows are counted over all segments; every part is int64.

    On an accelerator, call `prepare` with all parts that are needed before they are read.
    """

    def __init__(self, ends, block, stride, device):
        self.block, self.stride, self.device = block, stride, device
        self._begins, self._lengths = _lengths(ends)
        self.n_rows = int(ends[-1])
        self._counts = windows_per_segment(self._lengths, block, stride)
        self._first_window = np.cumsum(self._counts) - self._counts
        self.n_windows = int(self._counts.sum())
        self._parts = {}  # tensors on the device, by the name of the part and its size
        self._transfers = []
        self._preparing = threading.Lock()  # autograd runs the gradients in a thread of its own

    def prepare(self, *parts: tuple[str] | tuple[str, int]) -> None:
        """Make parts ready for what the current stream is given next, e.g. ("starts",), ("row_runs", 64). What is not
        on the device yet goes there in one transfer, for which nobody waits. RuntimeError if something is missing
        while a graph is captured."""
        with self._preparing:
            missing = [part for part in dict.fromkeys(parts) if part not in self._parts]
            if missing:
                arrays = [getattr(self, f"_make_{name}")(*size) for name, *size in missing]
                self._parts.update(zip(missing, self._on_device(arrays)))
            for transfer in self._transfers:
                transfer.use()

    @property
    def begins(self) -> torch.Tensor:
        """(2, segments + 1): the first row of each segment, and its first window; at the end, how many there are."""
        return self._part("begins")

    @property
    def starts(self) -> torch.Tensor:
        """(T',): first row of each window."""
        return self._part("starts")

    @property
    def groups(self) -> torch.Tensor:
        """(n_groups, 5): a `RowGroup` for every 16 rows of every segment, in the order of the rows."""
        return self._part("groups")

    def window_runs(self, windows: int) -> torch.Tensor:
        """(n_runs, 4): a `WindowRun` for every `windows` windows of a segment, and for what is left at its end. Runs
        of most rows come first, so that programs that take turns at them get equal work."""
        return self._part("window_runs", windows)

    def row_runs(self, rows: int) -> torch.Tensor:
        """(n_runs, 6): a `RowRun` for every `rows` rows of a segment, a multiple of the stride, and for what is left
        at its end. Runs of most rows come first."""
        return self._part("row_runs", rows)

    def _part(self, *part):
        if part not in self._parts:
            self.prepare(part)
        return self._parts[part]

    def _on_device(self, arrays):
        if self.device.type in HOSTS:
            return [torch.from_numpy(array).to(self.device) for array in arrays]
        self._transfers.append(Transfer(arrays, self.device))
        return self._transfers[-1].tensors

    def _make_begins(self):
        rows = np.append(self._begins, self._begins[-1] + self._lengths[-1])
        return np.stack([rows, np.append(self._first_window, self.n_windows)])

    def _make_starts(self):
        segment, i_window = spread(self._counts)
        return self._begins[segment] + i_window * self.stride

    def _make_groups(self):
        segment, i_group = spread(-(-self._lengths // GROUP))
        offset = i_group * GROUP  # of the group in its segment
        # window i holds the group if i * stride <= offset and offset + GROUP <= i * stride + block
        first = np.maximum(-(-(offset + GROUP - self.block) // self.stride), 0)
        end = np.minimum(offset // self.stride + 1, self._counts[segment])
        end = np.maximum(first, end)  # rows behind the last window: none
        first_window = self._first_window[segment]
        groups = RowGroup(
            row=self._begins[segment] + offset,
            n_rows=np.minimum(self._lengths[segment] - offset, GROUP),
            first=first_window + first,
            end=first_window + end,
            tap=offset - first * self.stride,
        )
        return np.stack(groups, axis=1)

    def _make_window_runs(self, windows):
        segment, i_run = spread(-(-self._counts // windows))
        first = i_run * windows
        count = np.minimum(self._counts[segment] - first, windows)
        runs = WindowRun(
            row=self._begins[segment] + first * self.stride,
            n_rows=(count - 1) * self.stride + self.block,
            window=self._first_window[segment] + first,
            n_windows=count,
        )
        return np.stack(_most_rows_first(runs), axis=1)

    def _make_row_runs(self, rows):
        segment, i_run = spread(-(-self._lengths // rows))
        offset = i_run * rows
        lead = -(-self.block // self.stride) - 1
        slots = rows // self.stride + lead
        slot_0 = offset // self.stride - lead  # counted in its segment, may be negative
        first = np.minimum(np.maximum(-slot_0, 0), slots)
        groups = -(-self._lengths // GROUP)
        runs = RowRun(
            row=self._begins[segment] + offset,
            n_rows=np.minimum(self._lengths[segment] - offset, rows),
            window=self._first_window[segment] + slot_0,
            first=first,
            end=np.maximum(np.minimum(self._counts[segment] - slot_0, slots), first),
            group=(np.cumsum(groups) - groups)[segment] + offset // GROUP,
        )
        return np.stack(_most_rows_first(runs), axis=1)


@lru_cache(maxsize=64)
def _kept_table(ends, block, stride, device):
    ends = np.frombuffer(ends, dtype=np.int64)
    check_ends(ends)
    return WindowTable(ends, block, stride, device)


# a thread that was preparing a table is not in the child, and its lock would never be released there
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_kept_table.cache_clear)


def _most_rows_first(runs):
    """Runs sorted by their rows; those of equally many stay in order, next to their neighbours."""
    order = np.argsort(-runs.n_rows.astype(np.int16), kind="stable")  # of 16 bits: a radix sort; runs are that short
    return [column[order] for column in runs]


def _lengths(ends):
    """Begin and length of each segment."""
    ends = np.asarray(ends, dtype=np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    return begins, ends - begins


def windows_per_segment(lengths, block, stride):
    return np.maximum(0, 1 + (lengths - block) // stride)


def spread(counts):
    """For counts (2, 0, 3): owner (0, 0, 2, 2, 2) and position in it (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
