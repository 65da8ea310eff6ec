"""The window-offset table against its definition, and its cache."""

import numpy as np
import torch
from cases import NAMED, cases
from hypothesis import given

from nsa import table


def definition(case):
    """Starts of the windows, and for each row the windows that hold it, by loops over everything."""
    starts, begin = [], 0
    for length in case.lengths:
        starts += range(begin, begin + length - case.block + 1, case.stride)
        begin += length
    holders = [[w for w, s in enumerate(starts) if s <= row < s + case.block] for row in range(begin)]
    return starts, holders


def check(case):
    starts, groups = table.build_table(case.actual_seq_len, *case.geometry)
    expected, holders = definition(case)
    assert starts.tolist() == expected
    assert starts.dtype == groups.dtype == np.int64
    assert table.count_windows(case.actual_seq_len, *case.geometry) == len(expected) == case.n_windows
    next_row = 0
    for row, n_rows, first, end, tap in groups.tolist():
        assert row == next_row  # groups cover every row once, in order
        assert 1 <= n_rows <= table.GROUP
        for i in range(n_rows):
            assert holders[row + i] == list(range(first, end))
            for k, window in enumerate(range(first, end)):
                assert row + i - starts[window] == tap + i - k * case.stride
        next_row += n_rows
    assert next_row == sum(case.lengths)


@given(case=cases())
def test_generated(case):
    check(case)


def test_named():
    for case in NAMED.values():
        check(case)


def test_is_computed_once():
    first = table.window_table([64, 200], 32, 16, torch.device("cpu"))
    assert table.window_table((64, 200), 32, 16, torch.device("cpu")) is first
    assert table.window_table((64, 200), 32, 32, torch.device("cpu")) is not first


def test_cache_is_bounded():
    for rows in range(16, 16 + 200):
        table.window_table([rows], 16, 16, torch.device("cpu"))
    info = table._cached_table.cache_info()
    assert info.currsize == info.maxsize < 200


def test_table_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        table.window_table([77, 154], 32, 16, torch.device("cpu"))
    x, weight = torch.randn(154, 1, 16, requires_grad=True), torch.randn(32, 1, requires_grad=True)
    torch.ops.nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=[77, 154]).sum().backward()
    assert x.grad.isfinite().all()


def test_many_segments_take_no_loop_over_them(monkeypatch):
    """100,000 segments cost as many numpy calls as one."""
    calls = []
    for name in ("repeat", "cumsum", "arange", "maximum", "minimum", "stack", "array", "concatenate"):
        function = getattr(np, name)
        monkeypatch.setattr(np, name, lambda *a, _f=function, **k: (calls.append(_f), _f(*a, **k))[1])
    table.build_table([100], 32, 16)
    one = len(calls)
    table.build_table(list(range(100, 100 * 100_001, 100)), 32, 16)
    assert len(calls) == 2 * one
