"""The window-offset table against its definition, and its cache."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import torch
from cases import NAMED, cases
from hypothesis import given

from nsa import table

CPU = torch.device("cpu")


def definition(case):
    """Starts of the windows, and for each row the windows that hold it, by loops over everything."""
    starts, begin = [], 0
    for length in case.lengths:
        starts += range(begin, begin + length - case.block + 1, case.stride)
        begin += length
    holders = [[w for w, s in enumerate(starts) if s <= row < s + case.block] for row in range(begin)]
    return starts, holders


def check(case):
    built = table.WindowTable(case.actual_seq_len, *case.geometry, CPU)
    starts, groups = built.starts, built.groups
    expected, holders = definition(case)
    assert starts.tolist() == expected
    assert starts.dtype == groups.dtype == torch.int64
    assert built.n_windows == len(expected)
    assert table.count_windows(case.actual_seq_len, *case.geometry) == len(expected) == case.n_windows
    next_row = 0
    for row, n_rows, first, end, tap in groups.tolist():
        assert row == next_row  # groups cover every row once, in order
        assert 1 <= n_rows <= table.GROUP
        for i in range(n_rows):
            assert holders[row + i] == list(range(first, end))
            for k, window in enumerate(range(first, end)):
                assert row + i - expected[window] == tap + i - k * case.stride
        next_row += n_rows
    assert next_row == sum(case.lengths)
    check_window_runs(case, built, expected)
    check_row_runs(case, built, expected, holders)


def check_window_runs(case, built, starts):
    for windows in (1, 3, 16):
        next_window = 0
        runs = built.window_runs(windows).tolist()
        assert runs == sorted(runs, key=lambda run: (-run[1], run[0]))  # most rows first
        for row, n_rows, first, count in sorted(runs):
            assert first == next_window  # runs cover every window once
            assert 1 <= count <= windows
            run = starts[first : first + count]
            assert run == list(range(row, row + count * case.stride, case.stride))
            assert row + n_rows == run[-1] + case.block
            next_window += count
        assert next_window == len(starts)


def check_row_runs(case, built, starts, holders):
    rows_of = {tuple(line[:1]): i for i, line in enumerate(built.groups.tolist())}
    for rows in (case.stride, 3 * case.stride):
        next_row = 0
        lead = -(-case.block // case.stride) - 1
        runs = built.row_runs(rows).tolist()
        assert runs == sorted(runs, key=lambda run: (-run[1], run[0]))
        for row, n_rows, slot_0, first, end, group in sorted(runs):
            assert row == next_row
            assert 1 <= n_rows <= rows
            assert rows_of[row,] == group
            held = {window for i in range(n_rows) for window in holders[row + i]}
            slots = {slot_0 + v for v in range(first, end)}
            assert held <= slots
            for window in slots:
                assert starts[window] == row + (window - slot_0 - lead) * case.stride
            next_row += n_rows
        assert next_row == sum(case.lengths)


@given(case=cases())
def test_generated(case):
    check(case)


def test_named():
    for case in NAMED.values():
        check(case)


def test_is_computed_once():
    first = table.window_table((64, 200), 32, 16, CPU)
    assert table.window_table((64, 200), 32, 16, CPU) is first
    assert table.window_table((64, 200), 32, 32, CPU) is not first
    for name, args in (("window_runs", (16,)), ("row_runs", (32,))):
        assert getattr(first, name)(*args) is getattr(first, name)(*args)
    assert first.starts is first.starts
    assert first.groups is first.groups


def test_cache_keeps_the_64_tables_used_last():
    tables = [weakref.ref(table.window_table((rows,), 16, 16, CPU)) for rows in range(16, 16 + 200)]
    gc.collect()
    assert [kept() is not None for kept in tables] == [False] * 136 + [True] * 64


def test_table_made_in_inference_mode_serves_training():
    x, weight = torch.randn(154, 1, 16), torch.randn(32, 1)
    with torch.inference_mode():
        torch.ops.nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=[77, 154])
    x.requires_grad_()
    weight.requires_grad_()
    torch.ops.nsa.nsa_compress(x, weight, 32, 16, actual_seq_len=[77, 154]).sum().backward()
    assert x.grad.isfinite().all()


def test_many_segments_take_no_loop_over_them(monkeypatch):
    """100,000 segments cost as many numpy calls as one."""
    calls = []
    for name in ("repeat", "cumsum", "arange", "maximum", "minimum", "argsort", "stack", "array", "concatenate"):
        function = getattr(np, name)
        monkeypatch.setattr(np, name, lambda *a, _f=function, **k: (calls.append(_f), _f(*a, **k))[1])

    def all_tables(actual_seq_len):
        built = table.WindowTable(actual_seq_len, 32, 16, CPU)
        return built.starts, built.groups, built.window_runs(16), built.row_runs(128)

    all_tables([100])
    one = len(calls)
    all_tables(list(range(100, 100 * 100_001, 100)))
    assert len(calls) == 2 * one


FORK = """
import os, signal, torch
from nsa.table import window_table

arguments = (80, 176), 32, 16, torch.device("cpu")
window_table(*arguments)._preparing.acquire()  # as a thread does that is busy while another one forks
child = os.fork()
if child == 0:
    signal.alarm(20)
    assert len(window_table(*arguments).starts) == 9
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_fork_while_another_thread_prepares_a_table():
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
