"""The clock of the simulator: small cases that are counted by hand, and the times that the vendor measured.

The small chip is an A2 of 2 cube cores and 4 vector cores of 1 GHz, whose memory gives 64 bytes a cycle. An instruction
is issued 4 cycles after the one before, and what waited for a flag starts 10 cycles after it was set.
"""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nsa.ascend import rates
from nsa.ascend.simulator import clock, traffic, vendor
from nsa.ascend.simulator.memory import Memory, View
from nsa.ascend.simulator.run import Run
from nsa.ascend.simulator.trace import Operation, Trace
from nsa.ascend.targets import TARGETS

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "clock.csv"
SMALL = replace(TARGETS["Ascend910B1"], cube_cores=2, vector_cores=4, clock=1e9, ddr_read=64e9, l2=2**20)
BYTES = np.dtype(np.int8)
VECTOR_DMA = 12.6  # cycles of a DMA instruction on A2
FROM_MEMORY, FROM_L2, WRITE = 50 + 200, 50 + 50, 40 + 50  # latencies: of MTE2 from memory and L2, of MTE3 to L2


def timed(*cores, target=SMALL, core_type="AIV"):
    """The `Timing` of lists of operations, one for each block."""
    traces = [Trace(block, core_type, issued=list(operations)) for block, operations in enumerate(cores)]
    return clock.time(Run([], (len(cores), 1, 1), traces), target)


def spans(timing, *pipes):
    """(pipe, start, end, why it started no earlier) of each instruction, in order of starts."""
    chosen = [span for span in timing.spans if span.pipe in pipes]
    return [
        (span.pipe, pytest.approx(span.start), pytest.approx(span.end), span.waited_for and span.waited_for[0])
        for span in sorted(chosen, key=lambda span: span.start)
    ]


def load(memory, first, size, rows=1, stride=0):
    view = View(memory, BYTES, first, 0, (rows, size), (stride, 1))
    return Operation("run", "MTE2", "load", 0, reads=(view,), work=(("load", 1),))


def store(memory, first, size):
    view = View(memory, BYTES, first, 0, (1, size), (0, 1))
    return Operation("run", "MTE3", "store", 0, writes=(view,), work=(("store", 1),))


def to_l0(amount):
    """Cycles: 55 and one for 256 bytes; 20 more until they are there."""
    return Operation("run", "MTE1", "load", 0, work=(("L1 to L0A", amount),))


def mad(blocks):
    """Cycles: 6 and one for each block; 20 more until the result is there."""
    return Operation("run", "M", "mad", 0, work=(("mad", 1), ("mad blocks", blocks)))


def test_a_pipe_waits_for_a_flag_of_another():
    flagged = [to_l0(2560), vendor.flag("set", "MTE1", "M", 0), vendor.flag("wait", "MTE1", "M", 0), mad(100)]
    timing = timed(flagged, core_type="AIC")
    assert spans(timing, "MTE1", "M") == [("MTE1", 4, 4 + 65, "scalar"), ("M", 69 + 20 + 10, 99 + 106, "flag")]
    assert timing.cycles == 205 + 20
    assert timing.seconds == pytest.approx(225e-9)
    assert timing.spans[-1].waited_for == ("flag", ("MTE1", "M", 0), flagged[1])
    assert timing.busy == pytest.approx({"FIX": 0, "M": 106 / 225, "MTE1": 65 / 225, "MTE2": 0, "S": 16 / 225})


def test_without_a_flag_pipes_run_side_by_side():
    timing = timed([to_l0(2560), mad(100), mad(100)], core_type="AIC")
    assert spans(timing, "M") == [("M", 8, 114, "scalar"), ("M", 114, 220, "queue")]
    assert timing.cycles == 240


def test_a_barrier_waits_for_results():
    barrier = Operation("barrier", "M", "pipe_barrier", 0)
    assert spans(timed([mad(100), barrier, mad(100)], core_type="AIC"), "M")[1] == ("M", 110 + 20, 236, "barrier")


def test_a_barrier_of_all_pipes_holds_the_scalar_unit():
    barrier = Operation("barrier", "ALL", "pipe_barrier", 0, scalar=3)
    timing = timed([to_l0(2560), mad(100), barrier, to_l0(2560)], core_type="AIC")
    assert spans(timing, "MTE1")[1] == ("MTE1", 8 + 106 + 20 + 4, 138 + 65, "scalar")


def loop(n, buffers):
    """Loads of 65 cycles and products of 206, which wait for each other's buffers."""
    sets = [vendor.flag("set", "M", "MTE1", i) for i in range(buffers)]
    body = []
    for i in range(n):
        buffer = i % buffers
        body += [vendor.flag("wait", "M", "MTE1", buffer), to_l0(2560), vendor.flag("set", "MTE1", "M", buffer)]
        body += [vendor.flag("wait", "MTE1", "M", buffer), mad(200), vendor.flag("set", "M", "MTE1", buffer)]
    return timed([*sets, *body], core_type="AIC").cycles


def test_two_buffers_hide_the_shorter_pipe():
    assert loop(11, 2) - loop(10, 2) == pytest.approx(206)
    assert loop(11, 1) - loop(10, 1) == pytest.approx(65 + 20 + 10 + 206 + 20 + 10)


def test_two_cores_share_the_memory():
    """The second starts 10 cycles later. The first has moved 640 bytes then, and then each gets 32 a cycle."""
    memory = Memory("GM", range(2**16))
    timing = timed([load(memory, 0, 6400)], [load(memory, 8192, 6400)])
    begin = 4 + VECTOR_DMA
    assert spans(timing, "MTE2") == [
        ("MTE2", 4, begin + 10 + 5760 / 32, "bandwidth"),
        ("MTE2", 14, begin + 10 + 5760 / 32 + 640 / 64, "bandwidth"),
    ]
    assert timing.cycles == pytest.approx(begin + 200 + FROM_MEMORY)
    assert (timing.from_memory, timing.from_l2, timing.written) == (12800, 0, 0)


def test_a_core_alone_draws_what_it_can():
    memory = Memory("GM", range(2**16))
    timing = timed([load(memory, 0, 10090)], target=replace(SMALL, ddr_read=1e12))
    assert timing.cycles == pytest.approx(4 + VECTOR_DMA + 10112 / 100.9 + FROM_MEMORY)  # in units of 32 bytes


def test_mte2_and_mte3_of_a_vector_core_take_turns():
    memory = Memory("GM", range(2**16))
    timing = timed([load(memory, 0, 6400), store(memory, 8192, 6400)])
    end = 4 + VECTOR_DMA + 100
    assert spans(timing, "MTE2", "MTE3") == [
        ("MTE2", 4, end, "scalar"),
        ("MTE3", end, end + VECTOR_DMA + 6400 / 64, "queue"),
    ]
    assert timing.written == 6400
    last = timing.spans[-1]
    assert last.waited_for == ("queue", "MTE2")


def test_mte2_and_fix_of_a_cube_core_do_not():
    memory = Memory("GM", range(2**16))
    fix = replace(store(memory, 8192, 6400), pipe="FIX", work=(("fixpipe", 1),))
    rows = replace(load(memory, 0, 6400), work=(("nd2nz", 1),))
    assert spans(timed([rows, fix], core_type="AIC"), "FIX")[0][1] == 8


def test_what_was_loaded_is_in_l2():
    memory = Memory("GM", range(2**22))
    again = [load(memory, 0, 6400), load(memory, 0, 6400)]
    slow = replace(SMALL, ddr_read=32e9)
    timing = timed(again, target=slow)
    end = 4 + VECTOR_DMA + 6400 / 32
    assert timing.cycles == pytest.approx(max(end + FROM_MEMORY, end + VECTOR_DMA + 6400 / 64 + FROM_L2))
    assert spans(timing, "MTE2")[1] == ("MTE2", end, end + VECTOR_DMA + 6400 / 64, "queue")
    assert (timing.from_memory, timing.from_l2) == (6400, 6400)
    # 1 MiB between, which is the size of L2
    timing = timed([again[0], load(memory, 2**20, 2**20), again[1]], target=slow)
    assert (timing.from_memory, timing.from_l2) == (2 * 6400 + 2**20, 0)


def test_cores_share_l2():
    """Eight load the same 64,000 bytes. L2 gives 234 bytes a cycle, of 5.2 TB/s for 24 cores of 1850 MHz, but while
    less than four are at it, at the start and at the end, it could give more than they draw."""
    memory = Memory("GM", range(2**16))
    chip = replace(SMALL, vector_cores=8, ddr_read=1e12)
    timing = timed(*([load(memory, 0, 64000)] for _ in range(8)), target=chip)
    assert (timing.from_memory, timing.from_l2) == (64000, 7 * 64000)
    assert timing.cycles - FROM_L2 == pytest.approx(8 * 64000 / (5.2e3 * 2 / (24 * 1.85)), rel=0.05)


def test_what_was_written_is_in_l2_and_goes_on_to_memory():
    """The store's bytes go to memory at 64 a cycle, beside those of the load, while there are any."""
    memory = Memory("GM", range(2**22))
    timing = timed([store(memory, 0, 6400), load(memory, 0, 6400)])
    assert (timing.from_memory, timing.from_l2) == (0, 6400)
    timing = timed([store(memory, 0, 6400)], [load(memory, 8192, 6400)])
    store_begins = 4 + VECTOR_DMA
    assert spans(timing, "MTE3") == [("MTE3", 4, store_begins + 100, "scalar")]
    # 640 bytes of the store are in memory when the load begins; each has 32 a cycle for 180 cycles
    assert spans(timing, "MTE2") == [("MTE2", 14, store_begins + 10 + 180 + 640 / 64, "bandwidth")]


def test_short_rows_cost_more():
    memory = Memory("GM", range(2**16))
    timing = timed([load(memory, 0, 32, rows=100, stride=512)])  # 8 cycles a burst
    assert spans(timing, "MTE2")[0][2] == 4 + VECTOR_DMA + 800
    rows = replace(load(memory, 0, 32, rows=100, stride=512), work=(("nd2nz", 1),))
    assert spans(timed([rows], core_type="AIC"), "MTE2")[0][2] == 4 + VECTOR_DMA + 513
    # and memory gives whole lines of 128 bytes
    timing = timed([load(memory, 0, 32, rows=100, stride=512)], target=replace(SMALL, ddr_read=6.4e9))
    assert spans(timing, "MTE2")[0][2] == 4 + VECTOR_DMA + 100 * 128 / 6.4
    assert timing.from_memory == 12800


@pytest.mark.parametrize(
    ("generation", "first", "moved"),
    [
        (rates.A2, 0, 544),  # units of 32 bytes from a line's start on
        (rates.A2, 64, 1024),  # two lines of 512
        (rates.A5, 0, 544),
        (rates.A5, 64, 544),
        (rates.A5, 2, 544),
    ],
)
def test_rows_that_cross_a_line(generation, first, moved):
    view = View(Memory("GM", range(2**16)), BYTES, first, 0, (10, 520), (4096, 1))
    pattern, line = traffic.Traffic(SMALL, generation)._pattern(view)
    assert (pattern.bytes, pattern.volume, line) == (5200, 10 * moved, 0)
    assert len(pattern.lines) == 10 * 5


def test_rows_of_a_view():
    memory = Memory("GM", range(2**16))
    half = np.dtype(np.float16)
    starts, length = traffic.rows_of(View(memory, half, 8, 1, (3, 1, 4, 5), (100, 7, 5, 1)))
    assert (starts.tolist(), length) == ([10, 210, 410], 40)
    starts, length = traffic.rows_of(View(memory, half, 8, 0, (4, 1), (1, 7)))
    assert (starts.tolist(), length) == ([8], 8)
    starts, length = traffic.rows_of(View(memory, half, 0, 0, (2, 2, 3), (100, 10, 2)))
    assert (sorted(starts.tolist()), length) == ([0, 4, 8, 20, 24, 28, 200, 204, 208, 220, 224, 228], 2)


def test_blocks_follow_each_other_on_a_core():
    """Three on two cube cores: the third on the first core, after it."""
    timing = timed([mad(100)], [mad(200)], [mad(300)], core_type="AIC")
    found = [(span.core.index, span.start, span.end) for span in sorted(timing.spans, key=lambda span: span.start)]
    assert found == [(0, 4, 110), (1, 10 + 4, 14 + 206), (0, 110 + 20 + 4, 134 + 306)]
    assert timing.cycles == 460
    assert timing.busy["M"] == pytest.approx((106 + 206 + 306) / 2 / 460)


def test_the_scalar_unit_waits_for_memory_once_a_line():
    memory = Memory("GM", range(2**16))
    table = [View(memory, np.dtype(np.int32), 0, i, (), ()) for i in (0, 15, 16)]
    loads = [Operation("run", "S", "load", 0, reads=(v,), work=(("scalar load", 1),), scalar=1) for v in table]
    assert spans(timed(loads), "S") == [("S", 1, 201, None), ("S", 202, 206, None), ("S", 207, 407, None)]


def test_the_scalar_unit_waits_for_a_pipe():
    timing = timed(
        [to_l0(2560), vendor.flag("set", "MTE1", "S", 0), vendor.flag("wait", "MTE1", "S", 0), mad(1)], core_type="AIC"
    )
    assert spans(timing, "M")[0][1] == 69 + 20 + 10 + 4


def test_flags_between_cores():
    """Both vector cores set, the second later; the cube core waits for both."""
    flag = ("team", 0)
    wait = Operation("team wait", "S", "sync_block_wait", 0, flag=flag)
    add = Operation("run", "V", "vadd", 0, work=(("vadd", 100),))  # 211 cycles, and 24
    traces = [Trace(0, "AIC", issued=[wait, mad(1)])]
    for sub_block, n in ((0, 1), (1, 2)):
        setter = Operation("team set", "V", "sync_block_set", 0, flag=flag)
        traces.append(Trace(0, "AIV", sub_block, issued=[*[add] * n, setter]))
    timing = clock.time(Run([], (1, 1, 1), traces), SMALL)
    assert spans(timing, "M")[0][1] == 4 + 2 * 211 + 24 + 200 + 4
    back = [Trace(0, "AIC", issued=[mad(1), Operation("team set", "M", "sync_block_set", 0, flag=flag)])]
    back += [Trace(0, "AIV", i, issued=[wait, add]) for i in (0, 1)]
    timing = clock.time(Run([], (1, 1, 1), back), SMALL)
    assert [span[1] for span in spans(timing, "V")] == [4 + 7 + 20 + 200 + 4] * 2


def test_a_trace_without_an_end_is_refused():
    with pytest.raises(RuntimeError, match="wait for ever"):
        timed([vendor.flag("wait", "MTE1", "M", 0), mad(1)], core_type="AIC")


@pytest.mark.parametrize(("pipe", "core_type"), [("MTE1", "AIC"), ("S", "AIV")])
def test_unknown_work_is_refused(pipe, core_type):
    with pytest.raises(ValueError, match="no time for sleep"):
        timed([Operation("run", pipe, "sleep", 0, work=(("sleep", 1),))], core_type=core_type)


def test_fair_shares():
    assert traffic.fair_level([1, 2], [10, 30], 40) == 15
    assert traffic.fair_level([2, 1], [10, 30], 40) == 20
    assert traffic.fair_level([2, 1], [10, 30], 100) == np.inf


def test_what_a_task_costs_beside_its_kernel():
    assert rates.task_overhead(SMALL) == pytest.approx(15.4e-6)
    assert rates.task_overhead(TARGETS["Ascend950PR_9589"]) == pytest.approx(3.1e-6)


def test_what_the_vendor_measured():
    """After a change of the clock or its rates: python -m nsa.ascend.simulator.vendor > docs/evidence/clock.csv"""
    with EVIDENCE.open(newline="") as file:
        kept = list(csv.DictReader(file))
    now = list(vendor.table())
    assert [{field: str(value) for field, value in row.items()} for row in now] == kept
    for row in now:
        limit = {vendor.FITTED: 0.05, "": 0.2, vendor.SAME_PLACE: 0.6}[row["note"]]
        assert abs(row["modelled_over_measured"] - 1) < limit, row["what"]
