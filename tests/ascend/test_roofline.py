"""The roofline model: every task of small cases counted by hand, against what the compiled kernels do in the simulator,
its promises on all chips, and what is kept of it.

The small case: 4 cube cores and 8 vector cores of 2 GHz, and memory that gives 128 bytes a cycle: 32 to each of 4
loading cube cores, 16 to each of 8 vector cores. 6 heads of 128, block 32, stride 16; documents of 570 and 20 rows. The
first has windows 0 to 33, which start every 16 rows and end in row 560; the second has none.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nsa import accelerator
from nsa.ascend import __main__ as command_line
from nsa.ascend import launches
from nsa.ascend.roofline import model as roofline
from nsa.ascend.roofline import report
from nsa.ascend.simulator import clock, simulator_driver
from nsa.ascend.simulator.op import Operators
from nsa.ascend.targets import MODELLED, TARGETS
from nsa.table import RowRun, WindowTable

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "roofline.json"
B3, A5 = TARGETS["Ascend910B3"], TARGETS["Ascend950PR_9589"]
SMALL = replace(B3, cube_cores=4, vector_cores=8, clock=2e9, ddr_read=256e9)
SMALL_A5 = replace(A5, cube_cores=4, vector_cores=8, clock=2e9, ddr_read=256e9)
# bytes a cycle of one core: alone from memory, and its share of L2, which gives a cube core no more than 110
CUBE_ALONE, VECTOR_ALONE = 135e9 / 2e9, 100.9e9 / 2e9
L2, L2_A5 = 110, 5.2e12 / 32 / 1650e6
VECTOR_L2 = 5.2e12 / 24 / 1850e6 / 2  # of 8 vector cores
CAST, MULTIPLY, ADD = 0.9, 2.3, 2.11  # cycles of 64 elements
CHECK = 0.9 + 2.11 + 1 + 2.11 + 7  # cast, subtract, compare, select, sum
WORK = roofline.Workload(590, 6, 128, 32, 16)
ROWS, COVERED, WINDOWS = 590, 560, 34  # all; in a window; windows
ROW = 6 * 128 * 2  # bytes of a row of all heads
PAIR = 2 * 128 * 2  # of a column: two heads
HEAD = 128 * 2  # of a column of A5


@pytest.fixture
def small(monkeypatch):
    """{family: {op: tasks}} of the small case."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (570, 590))
    return {family: roofline.model(WORK, SMALL, family) for family in roofline.FAMILIES}


@pytest.fixture
def small_a5(monkeypatch):
    """{op: tasks} of the small case in the cube family on A5."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (570, 590))
    return roofline.model(WORK, SMALL_A5, "cube")


def assert_kernel(kernel, name, moved, macs, **cycles):
    assert kernel.name == name
    assert kernel.bytes == moved
    assert kernel.macs == macs
    assert kernel.cycles == pytest.approx(cycles)


def test_cube_forward(small):
    """Runs of 16 windows, which load 272 rows, or what is left: rows 0 to 271, 256 to 527, 512 to 589.

    3 columns of 2 heads, each cut into 3 splits of a run: items 0 to 8 on 4 programs. Program 0 takes items 0, 4 and 8,
    one of each run; that is more than any other program has. Of the rows, 16 of the second and of the third run are
    loaded again. x is multiplied twice: head by head, and all heads with the first's band, for what is not finite.
    """
    (kernel,) = small["cube"]["forward"]
    band = 2 * 16 * 272 * 2  # bytes that an item loads
    written = 16 * (2 * 272 + 16) * 2  # 16 windows, each 16 elements further on in a row of both heads
    assert_kernel(
        kernel,
        "forward_fused_kernel",
        moved=3 * (ROWS + WINDOWS) * PAIR + 9 * written,
        macs=9 * (2 * 16 * 272 * 128 + 16 * 272 * 256),
        MTE2=590 * PAIR / 32 + (32 * PAIR + 3 * band) / L2,
        MTE1=3 * (3 * 16 * 272 * 2 / 256 + 2 * 272 * PAIR / 128),
        M=3 * 4 * (1 * 17 * 8),  # 16 x 272 times 272 x 128 in units of 16; of both heads it is two of these
        FIX=(WINDOWS * PAIR + 3 * 2 * 128 * 4) / 66,
    )


def test_cube_grad_input(small):
    """Runs of 112 rows and 8 slots: 0 to 4, of which the last ends at row 560; 5 with the second document, 6 with the
    10 rows that are left of the first.

    Slots with a window: 7 in run 0 (nothing starts before the document: windows 0 to 6), 8 in runs 1 to 3 (6 to 13, 13
    to 20, 20 to 27), 7 in run 4 (27 to 33): 38 for 34 windows. 3 columns, 4 splits, 12 items: program p has split p of
    all columns. Split 0 has runs 0 and 4: 224 rows, 13 windows first and one again; no other has as much.
    """
    (kernel,) = small["cube"]["grad_input"]
    band = 2 * 16 * 144 * 2
    assert_kernel(
        kernel,
        "grad_input_fused_kernel",
        moved=3 * (WINDOWS + ROWS) * PAIR + 12 * band,
        macs=3 * 7 * (2 * 112 * 16 * 128 + 16 * 16 * 256),
        MTE2=3 * (13 * PAIR / 32 + (PAIR + band) / L2),
        MTE1=3 * 2 * ((2 * 112 * 16 + 16 * 16) * 2 / 256 + 2 * 16 * PAIR / 128),
        M=3 * 2 * (2 * (7 * 1 * 8) + 1 * 1 * 16),
        FIX=3 * (224 * PAIR + 2 * 128 * 4) / 66,
    )


def test_cube_grad_weight(small):
    """Runs of 24 windows, which load 400 rows: 0 to 399, 384 to 589. 3 columns of 2 splits on 4 programs: program 0
    takes items 0 and 4, the large run of columns 0 and 2. Its sums are 32 x 400 for each of two heads, in fp32; those
    of the small run, of 10 windows, 32 x 176."""
    product, repair = small["cube"]["grad_weight"]
    sums = 2 * 32 * 4  # of a row
    assert_kernel(
        product,
        "grad_weight_cube_kernel",
        moved=3 * ((ROWS + WINDOWS) * PAIR + (400 + 176) * sums),
        macs=3 * 2 * 2 * 32 * 128 * 400,
        MTE2=2 * (400 + 24) * PAIR / 32,
        MTE1=2 * (32 * PAIR / 256 + 400 * PAIR / 128),
        M=2 * 2 * (2 * 8 * 25),
        FIX=2 * 400 * sums / 66,
    )
    # four programs, each for 3 heads and 16 taps: 24 and 10 windows, of which the vector unit adds 24 twice
    assert_kernel(
        repair,
        "grad_weight_repair_kernel",
        moved=0,
        macs=0,
        MTE2=3 * 16 * (24 + 10) * 4 / 64,
        V=3 * 16 * 2 * 24 / 64 * ADD,
        MTE3=0,
    )


def test_a5_forward(small_a5):
    """One run of 34 windows, 560 rows, in a tile of 40 windows and 656 rows. 6 columns of a head on 4 programs: program
    0 has two."""
    zeros, copy, product, repair = small_a5["forward"]
    assert_kernel(zeros, "zeros", 6 * 48 * 656 * 2, 0)
    assert_kernel(copy, "copy of the weights", 6 * 40 * 32 * 2, 0)
    band = 48 * 656 * 2
    assert_kernel(
        product,
        "forward_cube_kernel",
        moved=6 * ((COVERED + WINDOWS) * HEAD + band),
        macs=6 * 48 * 656 * 128,
        MTE2=2 * (560 * HEAD / 32 + band / L2_A5),
        MTE1=2 * (band / 256 + 656 * HEAD / 256),
        M=2 * (3 * 41 * 8),
        FIX=2 * WINDOWS * HEAD / 78,
    )
    # two turns, of 32 and 2 windows: two programs would draw 64 bytes a cycle each, were the way not 50
    assert_kernel(
        repair,
        "forward_repair_kernel",
        moved=WINDOWS * ROW,
        macs=0,
        MTE2=32 * ROW / VECTOR_ALONE,
        V=32 * 6 * 128 / 64 * CHECK,
        MTE3=0,
    )


def test_a5_grad_input(small_a5):
    """Runs of 256 rows and 17 slots: windows 0 to 15; 15 to 31; 31 to 33 with 58 rows; none. 6 columns, 2 splits, 12
    items: program 0 has split 0, runs 0 and 2, of 3 columns: 18 windows first and one again."""
    zeros, copy, product, repair = small_a5["grad_input"]
    assert_kernel(zeros, "zeros", 6 * 32 * (16 * 16 + 32) * 2, 0)
    assert_kernel(copy, "copy of the weights", 6 * 17 * 32 * 2, 0)
    band = 32 * 256 * 2
    assert_kernel(
        product,
        "grad_input_cube_kernel",
        moved=6 * ((WINDOWS + ROWS) * HEAD + band),
        macs=6 * 4 * 256 * 32 * 128,
        MTE2=3 * (18 * HEAD / 32 + (HEAD + band) / L2_A5),
        MTE1=3 * 2 * (band / 256 + 32 * HEAD / 256),
        M=3 * 2 * (16 * 2 * 8),
        FIX=3 * (256 + 58) * HEAD / 78,
    )
    # a run for each of four programs; the second has 17 slots, in two blocks of 16, and one window again
    assert_kernel(
        repair,
        "grad_input_repair_kernel",
        moved=WINDOWS * ROW,
        macs=0,
        MTE2=16 * ROW / 32 + ROW / 64,
        V=2 * 16 * 6 * 128 / 64 * CHECK,
        MTE3=0,
    )


def test_a5_grad_weight(small_a5):
    """The forward's run and items. Of one head, no rows past the run's are loaded."""
    product, repair = small_a5["grad_weight"]
    assert_kernel(
        product,
        "grad_weight_cube_kernel",
        moved=6 * ((COVERED + WINDOWS) * HEAD + 48 * 560 * 4),
        macs=6 * 48 * 128 * 656,
        MTE2=2 * (560 + 34) * HEAD / 32,
        MTE1=2 * (48 * HEAD / 256 + 656 * HEAD / 256),
        M=2 * (3 * 8 * 41),
        FIX=2 * 48 * 560 * 4 / 78,
    )
    assert_kernel(
        repair,
        "grad_weight_repair_kernel",
        moved=0,
        macs=0,
        MTE2=3 * 16 * 34 * 4 / 64,
        V=3 * 16 * 40 / 64 * ADD,
        MTE3=0,
    )


def test_vector_forward(small):
    """34 windows on 8 programs: program 0 has windows 0, 8, 16, 24 and 32. Of 32 rows, 16 are in the window before,
    but for window 0."""
    (kernel,) = small["vector"]["forward"]
    assert_kernel(
        kernel,
        "forward_vector_kernel",
        moved=(COVERED + WINDOWS) * ROW,
        macs=0,
        MTE2=96 * ROW / 16 + 64 * ROW / VECTOR_L2,
        V=5 * 32 * 6 * 128 / 64 * (CAST + MULTIPLY + ADD),
        MTE3=5 * ROW / 64,
    )


def test_vector_grad_input(small):
    """Groups of 16 rows: 36 of the first document and 2 of the second, on 8 programs.

    Group 0 is in window 0, groups 1 to 33 are in two, group 34 is in window 33, groups 35 to 37 are in none. Program 1
    has groups 1, 9, 17, 25, 33: 10 windows, half of them again. Program 0 has 0, 8, 16, 24, 32: as many rows, all 80.
    """
    (kernel,) = small["vector"]["grad_input"]
    assert_kernel(
        kernel,
        "grad_input_vector_kernel",
        moved=(WINDOWS + ROWS) * ROW,
        macs=0,
        MTE2=5 * ROW / 16 + 5 * ROW / VECTOR_L2,
        # a window: cast its row, multiply and add it to 16 rows; at the end of a group, cast 16 rows
        V=(10 * (CAST + 16 * (MULTIPLY + ADD)) + 5 * 16 * CAST) * 6 * 128 / 64,
        MTE3=80 * ROW / 64,
    )


def test_vector_grad_weight(small):
    """The forward's windows, and a row of dy for each."""
    kernel, total, cast = small["vector"]["grad_weight"]
    sums = 8 * 32 * 6 * 4
    assert_kernel(
        kernel,
        "grad_weight_vector_kernel",
        moved=(COVERED + WINDOWS) * ROW + sums,
        macs=0,
        MTE2=(96 + 5) * ROW / 16 + 64 * ROW / VECTOR_L2,
        V=5 * (32 * (CAST + MULTIPLY + ADD) + CAST) * 6 * 128 / 64,
        MTE3=0,
    )
    assert_kernel(total, "sum", sums, 0)
    assert_kernel(cast, "cast", 0, 0)


def test_splits_are_runs_that_follow_each_other(small):
    """On 2 cube cores the forward's runs of 16, 16 and 2 windows are 2 splits: the first, and the other two. Program 1
    has the latter of all columns."""
    (kernel,) = roofline.model(WORK, replace(SMALL, cube_cores=2), "cube")["forward"]
    assert kernel.cycles["FIX"] == pytest.approx(3 * (18 * PAIR + 2 * 128 * 4) / 66)


def test_a_split_has_the_sums_of_its_longest_run(monkeypatch):
    """Two documents of 570 rows have runs of 24, 24, 10 and 10 windows: on 2 cube cores two splits, of 400 and 176
    rows."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (570, 1140))
    small = replace(SMALL, cube_cores=2)
    product, repair = roofline.model(WORK._replace(rows=1140), small, "cube")["grad_weight"]
    assert product.bytes == 3 * ((1140 + 2 * WINDOWS) * PAIR + (400 + 176) * 2 * 32 * 4)
    assert repair.cycles["MTE2"] == pytest.approx(3 * 16 * (24 + 10) * 4 / (5.2e12 / 24 / 1850e6 * 2 / 4))


def test_items_of_unequal_splits(small):
    """On 5 cube cores they are 3 splits: program 1 takes items 1 and 6, two runs of 16 windows; no other has more."""
    (kernel,) = roofline.model(WORK, replace(SMALL, cube_cores=5), "cube")["forward"]
    assert kernel.cycles["FIX"] == pytest.approx((32 * PAIR + 2 * 2 * 128 * 4) / 66)


def test_several_turns_of_a_check(small_a5):
    """A single vector core looks at 32 windows and then at 2, in two blocks of 32."""
    *_, repair = roofline.model(WORK, replace(SMALL_A5, cube_cores=1, vector_cores=1), "cube")["forward"]
    assert repair.cycles["MTE2"] == pytest.approx(34 * ROW / VECTOR_ALONE)
    assert repair.cycles["V"] == pytest.approx(2 * 32 * 6 * 128 / 64 * CHECK)


def test_half_heads(monkeypatch):
    """At D 256 a column is one head, and in dInput half of one: 224 rows of 128 elements."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (570, 590))
    kernels = roofline.model(roofline.Workload(590, 5, 256, 32, 16), SMALL, "cube")
    (kernel,) = kernels["grad_input"]
    assert kernel.bytes == 5 * 2 * ((WINDOWS + ROWS) * 256 + 2 * 16 * 256 * 2)  # 2 splits
    assert kernel.macs == 5 * 2 * 4 * (224 + 16) * 16 * 128  # halves; runs: 2 of 224 rows, one of 122, one of 20
    assert kernels["forward"][0].macs == 5 * 3 * 2 * 16 * 272 * 256


def test_more_slots_than_a_block(monkeypatch):
    """At D 16 a run has 1024 rows and 65 slots: dInput's check reads the 34 windows in 3 blocks of 16."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (570, 590))
    *_, repair = roofline.model(roofline.Workload(590, 1, 16, 32, 16), SMALL_A5, "cube")["grad_input"]
    assert repair.cycles["V"] == pytest.approx(3 * 16 * 16 / 64 * CHECK)


def test_few_windows(monkeypatch):
    """Two windows: two vector cores work, which would draw 64 bytes a cycle each, were the way not 50."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (48,))
    work = roofline.Workload(48, 1, 128, 32, 16)
    (kernel,) = roofline.model(work, SMALL, "vector")["forward"]
    assert kernel.cycles["MTE2"] == pytest.approx(32 * 256 / VECTOR_ALONE)
    assert roofline.model(work, SMALL, "vector")["grad_weight"][1].bytes == 2 * 32 * 4
    # one item, one program: it would draw 128 bytes a cycle, were the way not 67.5
    (product,) = roofline.model(work, SMALL, "cube")["forward"]
    assert product.cycles["MTE2"] == pytest.approx(48 * 256 / CUBE_ALONE + 16 * 272 * 2 / L2)


@pytest.fixture(scope="module")
def simulated():
    """The launches of the small case in the cube family, in the simulator."""
    table = WindowTable((570, 590), 32, 16, torch.device("cpu"))
    machine = accelerator.Machine(4, 8, accelerator.chip_of(SMALL))
    x, dy, weight = (torch.ones(sizes, dtype=torch.bfloat16) for sizes in ((590, 6, 128), (34, 6, 128), (32, 6)))
    with simulator_driver(SMALL, check=False) as log:
        accelerator.forward(x, weight, table, machine, "cube")
        accelerator.grad_input(dy, weight, table, 590, machine, "cube")
        accelerator.grad_weight(dy, x, table, machine, "cube")
    return log


@pytest.mark.parametrize("number", range(3), ids=roofline.OPS)
def test_the_compiled_kernels_do_what_is_counted(small, simulated, number):
    """M, MTE1 and FIX of the busiest cube core, to the last unit and byte, and no kernel is simulated faster."""
    kernel = [kernel for op in roofline.OPS for kernel in small["cube"][op]][number]
    run = simulated[number].run
    cores = [Counter() for trace in run.traces if trace.core_type == "AIC"]
    for core, trace in zip(cores, (trace for trace in run.traces if trace.core_type == "AIC")):
        for operation in trace.issued:
            core.update(dict(operation.work))
            if operation.pipe == "FIX":
                core["stored"] += sum(np.prod(view.sizes) * view.dtype.itemsize for view in operation.writes)
    assert kernel.cycles["M"] == max(core["mad blocks"] for core in cores)
    mte1 = max(core["L1 to L0A"] / 256 + core["L1 to L0B"] / 128 for core in cores)
    assert kernel.cycles["MTE1"] == pytest.approx(mte1, rel=1e-12)
    assert kernel.cycles["FIX"] == pytest.approx(max(core["stored"] for core in cores) / 66, rel=1e-12)
    timing = clock.time(run, SMALL)
    assert kernel.seconds(SMALL) < timing.seconds
    assert kernel.bytes <= timing.from_memory + timing.written


@pytest.mark.parametrize("family", roofline.FAMILIES)
@pytest.mark.parametrize("name", ["Ascend910B3", "Ascend910_9391", "Ascend950PR_9589"])
def test_tasks_are_those_of_a_call(name, family):
    """Kernels, by name, and the framework's operators."""
    target = TARGETS[name]
    table = WindowTable((1000,), 32, 16, torch.device("meta"))
    machine = accelerator.Machine(target.cube_cores, target.vector_cores, accelerator.chip_of(target))
    x, dy, weight = (
        torch.empty(sizes, dtype=torch.bfloat16, device="meta")
        for sizes in ((1000, 8, 128), (table.n_windows, 8, 128), (32, 8))
    )
    tasks = roofline.model(roofline.Workload(8192, 8, 128, 32, 16), target, family)
    for op, arguments in (
        ("forward", (x, weight, table)),
        ("grad_input", (dy, weight, table, 1000)),
        ("grad_weight", (dy, x, table)),
    ):
        operators = Operators()
        with launches.recorded() as launched, operators:
            getattr(accelerator, op)(*arguments, machine, family)
        assert [task.name for task in tasks[op] if task.name.endswith("_kernel")] == [each.name for each in launched]
        assert len(tasks[op]) == len(launched) + operators.count


def test_what_is_new():
    """Ranges in any order: 0 to 3, then 2 to 5, 6 and 7, and 3 to 4 within the second."""
    first, end = np.array([2, 0, 6, 9, 3]), np.array([6, 4, 8, 9, 5])
    assert roofline._new(first, end).tolist() == [2, 4, 2, 0, 0]


def test_limit(small):
    assert roofline.limit(WORK, "forward") == (ROWS + WINDOWS) * ROW
    assert roofline.limit(WORK, "grad_input") == (WINDOWS + ROWS) * ROW
    assert roofline.limit(WORK, "grad_weight") == ROWS * ROW  # dy was read already


def test_time_of_a_kernel():
    kernel = roofline.Kernel.of("of both", 512, 0, {"MTE2": 3, "V": 5, "M": 4})
    assert kernel.seconds(SMALL) == 5 / 2e9  # the busiest pipe
    assert kernel._replace(bytes=25600.0).seconds(SMALL) == 25600 / 256e9  # 100 ns
    assert roofline.Kernel.of("of the framework", 512).seconds(SMALL) == 512 / 256e9


def test_report(small):
    """The dWeight's time counts twice in no sum, and each ratio is one of sums, not a sum of ratios."""
    given = report.report(WORK, SMALL, "cube")
    forward, grad_input, grad_weight = small["cube"].values()
    seconds = [sum(kernel.seconds(SMALL) for kernel in kernels) for kernels in (forward, grad_input, grad_weight)]
    limits = [(ROWS + WINDOWS) * ROW / 256e9, (ROWS + WINDOWS) * ROW / 256e9, ROWS * ROW / 256e9]
    assert list(given["seconds"].values()) == seconds
    assert given["x_limit"] == pytest.approx(
        {
            "forward": seconds[0] / limits[0],
            "backward": (seconds[1] + seconds[2]) / (limits[1] + limits[2]),
            "both": sum(seconds) / sum(limits),
        }
    )
    everything = forward + grad_input + grad_weight
    assert given["tasks"] == {"forward": 1, "grad_input": 1, "grad_weight": 2}
    with_tasks = [seconds[0] + 15.4e-6, seconds[1] + 15.4e-6, seconds[2] + 2 * 15.4e-6]
    assert given["x_limit_with_tasks"] == pytest.approx(
        {
            "forward": with_tasks[0] / limits[0],
            "backward": (with_tasks[1] + with_tasks[2]) / (limits[1] + limits[2]),
            "both": sum(with_tasks) / sum(limits),
        }
    )
    assert given["bytes"] == sum(kernel.bytes for kernel in everything)
    assert given["multiply_adds"] == sum(kernel.macs for kernel in everything)
    assert given["cycles"]["FIX"] == sum(kernel.cycles["FIX"] for kernel in everything if "FIX" in kernel.cycles)
    assert [kernel["name"] for kernel in given["kernels"]] == [kernel.name for kernel in everything]
    assert given["kernels"][2]["seconds"] == everything[2].seconds(SMALL)


def test_documents_fill_the_rows():
    for rows in (8192, 131072):
        ends = roofline.documents(rows)
        assert ends[-1] == rows
        assert all(np.diff((0, *ends)) > 0)
    assert roofline.documents(ends[0]) == (ends[0],)


def test_documents_have_log_normal_lengths():
    lengths = np.diff((0, *roofline.documents(2**22)))[:-1]
    assert np.median(lengths) == pytest.approx(1000, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(1, rel=0.05)


def test_labels():
    assert str(roofline.USUAL) == "T 64k N 8 D 128 block 32 stride 16"


def test_usual_workload_is_near_the_limit():
    x_limit = report.report(roofline.USUAL, B3, "cube")["x_limit"]
    assert 1 < x_limit["forward"] <= 1.15
    assert 1 < x_limit["both"] <= 1.35


@pytest.mark.parametrize("target", MODELLED.values(), ids=list(MODELLED))
def test_no_kernel_is_faster_than_its_bytes(target):
    """Tail rows in no window are never read, so a whole op may be a little faster than the limit."""
    for family in roofline.FAMILIES:
        for work in roofline.WORKLOADS:
            for op, kernels in roofline.model(work, target, family).items():
                seconds = [kernel.seconds(target) for kernel in kernels]
                assert sum(seconds) > 0.97 * roofline.limit(work, op) / target.ddr_read, (work, op)
                for kernel, time in zip(kernels, seconds):
                    assert time >= kernel.bytes / target.ddr_read, (work, kernel.name)


def test_the_evidence_is_what_the_model_gives():
    """After a change of kernels, tiles or the model: python -m nsa.ascend roofline --out docs/evidence"""
    kept = json.loads(EVIDENCE.read_text())
    now = json.loads(report.to_json([r for target in MODELLED.values() for r in report.reports_of(target)]))
    assert_same(kept, now, "roofline.json")


def test_the_documentation_has_the_models_numbers():
    text = (EVIDENCE.parents[1] / "roofline.md").read_text()
    for family in roofline.FAMILIES:
        of_usual = report.report(roofline.USUAL, B3, family)
        for label, key in (("", "x_limit"), (", with tasks", "x_limit_with_tasks")):
            assert f"| {family}{label} | {' | '.join(f'{x:.2f}' for x in of_usual[key].values())} |" in text
        tasks = [report.report(roofline.USUAL, target, family)["tasks"].values() for target in (B3, A5)]
        assert f"| {family} | {' | '.join(', '.join(map(str, numbers)) for numbers in tasks)} |" in text
    vector, cube = (
        {(target.name, work): report.report(work, target, family) for target in (B3, A5) for work in roofline.WORKLOADS}
        for family in ("vector", "cube")
    )
    wide, apart = roofline.USUAL._replace(block=128), roofline.USUAL._replace(block=16)
    assert f"take {vector[B3.name, wide]['x_limit']['both']:.1f} times the memory limit" in text
    for target, work, key, sentence in (
        (B3, apart, "x_limit", "{} against {} on Ascend910B3 and"),
        (A5, apart, "x_limit", "{} against {} on Ascend950PR_9589, where"),
        (B3, apart, "x_limit_with_tasks", "{} against {} on Ascend910B3;"),
        *(
            (A5, roofline.USUAL._replace(rows=k * 1024), "x_limit_with_tasks", f"{{}} against {{}} at T {k}k")
            for k in (8, 64, 128)
        ),
    ):
        ratios = (f"{family[target.name, work][key]['both']:.2f}" for family in (vector, cube))
        assert sentence.format(*ratios) in text
    usual = cube[B3.name, roofline.USUAL]
    forward, grad_input, grad_weight = (f"{seconds * 1e6:.0f}" for seconds in usual["seconds"].values())
    assert f"has {forward}, {grad_input} and {grad_weight} us" in text
    forward, grad_input, grad_weight, _ = (f"{k['bytes'] / B3.ddr_read * 1e6:.0f}" for k in usual["kernels"])
    assert f"of which {forward}, {grad_input} and {grad_weight} are" in text
    for block, stride in ((32, 16), (64, 16), (64, 32), (128, 16)):
        work = roofline.USUAL._replace(block=block, stride=stride)
        tile = accelerator.chip_of(A5).grad_input_tile(block, stride, work.heads, work.dim)
        table = WindowTable(roofline.documents(work.rows), block, stride, torch.device("cpu"))
        runs = RowRun(*table.row_runs(tile.rows).T)
        forward, grad_input = table.n_windows / work.rows, float((runs.end - runs.first).sum()) / work.rows
        assert f"| {block}/{stride} | {forward:.3f} | {grad_input:.3f} |" in text


def test_the_documentation_has_modelled_beside_simulated_times():
    text = (EVIDENCE.parents[1] / "roofline.md").read_text()
    records = json.loads(EVIDENCE.with_name("simulated.json").read_text())
    for k in (8, 32, 128):
        work = roofline.USUAL._replace(rows=k * 1024)
        modelled = report.report(work, B3, "cube")
        key = (B3.name, str(work), "cube")
        (simulated,) = (r for r in records if (r["target"], r["workload"], r["family"]) == key)
        cells = [f"{modelled['seconds'][op] * 1e6:.1f}, {simulated[op]['kernels'] * 1e6:.1f}" for op in roofline.OPS]
        assert f"| T {k}k | {' | '.join(cells)} |" in text
        for op in roofline.OPS:
            assert modelled["tasks"][op] == simulated[op]["tasks"]
            assert roofline.limit(work, op) / B3.ddr_read == pytest.approx(simulated[op]["limit"])
    faster = 1 - simulated["grad_weight"]["kernels"] / modelled["seconds"]["grad_weight"]  # at T 128k
    assert f"dWeight at T 128k is simulated {faster:.0%} faster".replace("%", " %") in text


def assert_same(kept, now, where):
    """Nested dicts and lists, numbers but for the last digits, which are numpy's."""
    assert type(kept) is type(now), where
    if isinstance(now, dict):
        assert list(kept) == list(now), where
        for key in now:
            assert_same(kept[key], now[key], f"{where}, {key}")
    elif isinstance(now, list):
        assert len(kept) == len(now), where
        for i, (one, other) in enumerate(zip(kept, now)):
            assert_same(one, other, f"{where}, {i}")
    elif isinstance(now, float):
        assert abs(kept - now) <= 1e-9 * abs(now), where
    else:
        assert kept == now, where


def test_command(capsys, tmp_path):
    assert command_line.main(["roofline", "--targets", "Ascend910B3", "Ascend950DT_9591", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Ascend910B3: modelled, not measured" in printed
    assert "Ascend950DT_9591: modelled, not measured" in printed
    assert printed.count("assumed to be those of Ascend950PR_9589") == printed.count("assumed") == 1
    content = json.loads((tmp_path / "roofline.json").read_text())
    assert content["what"] == "modelled, not measured"
    assert len(content["reports"]) == 2 * 2 * len(roofline.WORKLOADS)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
