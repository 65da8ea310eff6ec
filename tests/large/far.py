"""Packs of more than 2^31 elements: zeros, but for places at both ends and around the element 2^31, or other elements.

Memory that nobody writes costs nothing, however large it is, and reads as zeros. In front of each tensor lies as much
of it as an offset of 32 bits reaches back. So an offset that has wrapped reads zeros there, or writes there what is
missing in its place: the test fails, and the process goes on.
"""

import mmap
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from math import prod
from unittest import mock

import numpy as np
import torch
from tolerance import assert_close

FAR = 2**31  # elements
NO_RESERVE = (
    0x4000  # Linux's MAP_NORESERVE, which Python's mmap does not name: so memory may be larger than the machine
)
NEAR = 200  # rows on either side of what a place is about
MARGIN = (
    2**19
)  # elements at a tensor's ends, and around 2^31, that are NaN until they are written: more than a place has

_empty = torch.empty


def untouched(shape, dtype):
    """Zeros, with as many in front as an offset of 32 bits reaches back."""
    kept = FAR + prod(shape)
    memory = mmap.mmap(-1, kept * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    memory.madvise(mmap.MADV_HUGEPAGE)  # 2 MiB a page, or to read it all takes minutes
    return torch.frombuffer(memory, dtype=dtype)[FAR:].view(shape)


@contextmanager
def far_results():
    """torch.empty gives such memory, with NaN where results that are not zero belong."""

    def empty(*shape, dtype=torch.float32, device="cpu"):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if not dtype.is_floating_point:
            return _empty(shape, dtype=dtype, device=device)
        tensor = untouched(shape, dtype)
        for some in (slice(MARGIN), slice(-MARGIN, None), slice(FAR - MARGIN, FAR + MARGIN)):
            tensor.view(-1)[some] = torch.nan
        return tensor

    with mock.patch.object(torch, "empty", empty):
        yield


class Place:
    """Rows [row, end) of a pack, the windows [window, window_end) that lie in them, and the `Case` that they are."""

    def __init__(self, pack, middle):
        starts, n_rows = pack.starts, pack.actual_seq_len[-1]
        self.row = int(starts[np.searchsorted(starts, middle - NEAR)])
        self.end = min(middle + NEAR, n_rows)
        borders = [border for border in pack.actual_seq_len if self.row < border < self.end]
        lengths = tuple(end - begin for begin, end in pairwise([self.row, *borders, self.end]))
        self.window = int(np.searchsorted(starts, self.row))
        numbers = replace(pack.numbers, lengths=lengths, seed=middle)
        self.window_end = self.window + numbers.n_windows
        x, _, dy = numbers.inputs
        # rows that another window holds too are zero, so that y is zero outside the places
        held_before = starts[self.window - 1] + numbers.block if self.window else 0
        held_after = starts[self.window_end] if self.window_end < len(starts) else n_rows
        x[: max(held_before - self.row, 0)] = 0
        x[held_after - self.row :] = 0
        self.case = numbers.with_inputs(x, pack.numbers.inputs[1], dy)

    @property
    def rows(self):
        return slice(self.row, self.end)

    @property
    def windows(self):
        return slice(self.window, self.window_end)


class FarPack:
    """Packed segments: x (T, N, D), weight (block, N) and dy (T', N, D) of untouched memory, with numbers in places.

    `numbers` is a `Case` for its sizes and its weight. `elements` are those of x around which there are places, beside
    both ends. With `bad`, the last place has infinities in heads 1 and 2 of x, the latter in the last row, and a NaN
    in head 4 of dy.
    """

    def __init__(self, lengths, numbers, elements, bad=False):
        self.numbers = numbers
        self.actual_seq_len = np.cumsum(lengths).tolist()
        row_size = numbers.n * numbers.d
        self.places = [
            Place(self, middle)
            for middle in (NEAR, *(element // row_size for element in elements), self.actual_seq_len[-1] - NEAR)
        ]
        if bad:
            x, _, dy = self.places[-1].case.inputs
            x[NEAR, 1, 3], x[-1, 2, 3] = torch.inf, torch.inf
            dy[6, 4, 7] = torch.nan

    @cached_property
    def starts(self):
        """(T',): first row of each window."""
        ends, (block, stride) = self.actual_seq_len, self.numbers.geometry
        return np.concatenate(
            [np.arange(begin, end - block + 1, stride) for begin, end in pairwise([0, *ends]) if end - begin >= block]
        )

    @cached_property
    def x(self):
        x = untouched((self.actual_seq_len[-1], self.numbers.n, self.numbers.d), self.numbers.dtype)
        for place in self.places:
            x[place.rows] = place.case.inputs[0]
        return x

    @property
    def weight(self):
        return self.numbers.inputs[1]

    @cached_property
    def dy(self):
        dy = untouched((len(self.starts), self.numbers.n, self.numbers.d), self.numbers.dtype)
        for place in self.places:
            dy[place.windows] = place.case.inputs[2]
        return dy

    def check_forward(self, y):
        self._check_places(y, len(self.starts), [place.windows for place in self.places], 0)

    def check_grad_input(self, dx):
        self._check_places(dx, self.actual_seq_len[-1], [place.rows for place in self.places], 1)

    def check_grad_weight(self, dw):
        """It is the sum over the places, as all other products are zero, and zeros change no sum."""
        cases = [place.case for place in self.places]
        exact, magnitude = (sum(getattr(case, what)[2] for case in cases) for what in ("exact", "magnitude"))
        assert_close(dw, exact, magnitude, sum(case.terms[2] for case in cases))

    def _check_places(self, result, n_rows, places, which):
        """`result` is number `which` of a case; what lies outside the places has to be zero. The places get zeros."""
        assert result.shape == (n_rows, self.numbers.n, self.numbers.d)
        assert result.dtype == self.numbers.dtype
        for some, place in zip(places, self.places):
            case = place.case
            assert_close(result[some], case.exact[which], case.magnitude[which], case.terms[which])
            result[some] = 0
        assert result.count_nonzero() == 0
