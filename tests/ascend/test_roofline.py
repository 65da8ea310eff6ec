"""The roofline model: every kernel of a small case counted by hand, its promises on all chips, and what is kept of it.

The small case: 4 cube cores and 8 vector cores of 2 GHz, and memory that gives 128 bytes a cycle: 32 to each of 4
loading cube cores, 16 to each of 8 vector cores. From L2 a cube core loads 110 bytes a cycle, a vector core 55.

6 heads of 128, block 32, stride 16; documents of 570 and 20 rows. The first has windows 0 to 33, which start every
16 rows and end in row 560; the second has none.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nsa import accelerator
from nsa.ascend import __main__ as command_line
from nsa.ascend import rates
from nsa.ascend.roofline import model as roofline
from nsa.ascend.roofline import report
from nsa.ascend.targets import MODELLED, TARGETS
from nsa.table import RowRun, WindowTable

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "roofline.json"
B3 = TARGETS["Ascend910B3"]
SMALL = replace(B3, cube_cores=4, vector_cores=8, clock=2e9, ddr_read=256e9)
WORK = roofline.Workload(590, 6, 128, 32, 16)
ROWS, COVERED, WINDOWS = 590, 560, 34  # all; in a window; windows
ROW = 6 * 128 * 2  # bytes of a row of all heads
PAIR = 2 * 128 * 2  # of a column: two heads


@pytest.fixture
def small(monkeypatch):
    """{family: {op: kernels}} of the small case."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (570, 590))
    return {family: roofline.model(WORK, SMALL, family) for family in roofline.FAMILIES}


def assert_kernel(kernel, name, moved, macs, **cycles):
    assert kernel.name == name
    assert kernel.bytes == moved
    assert kernel.macs == macs
    assert kernel.cycles == pytest.approx(cycles)


def test_cube_forward(small):
    """Runs of 24 windows, 400 rows: run 0 is full, run 1 has windows 24 to 33, 176 rows; 576 are loaded for 560.

    3 columns of 2 heads, each cut into 2 splits of a run: items 0 to 5 on 4 programs. Program 0 takes items 0 and 4,
    the large run of columns 0 and 2; that is more than any other program has.
    """
    band_matrix, product, repair = small["cube"]["forward"]
    assert_kernel(band_matrix, "band matrix", 2 * (6 * 32 * 400 * 2), 0)
    band = 2 * 32 * 400 * 2  # bytes of a column's matrix: its first loading is one of two
    first, again = 400 * PAIR * 560 / 576, 400 * PAIR * 16 / 576
    assert_kernel(
        product,
        "forward_cube_kernel",
        moved=3 * ((COVERED + WINDOWS) * PAIR + band),
        macs=3 * 2 * 2 * 32 * 400 * 128,  # columns, runs, heads
        MTE2=2 * ((first + band / 2) / 32 + (again + band / 2) / 110),
        MTE1=2 * (band / 512 + 400 * PAIR / 256),
        M=2 * 2 * (2 * 25 * 8),  # runs of 2 heads, each 32 x 400 times 400 x 128 in units of 16
        FIX=2 * 24 * PAIR / 86,
    )
    # two turns, of 32 and 2 windows: two programs would draw 64 bytes a cycle each, were the way not 55
    assert_kernel(
        repair,
        "forward_repair_kernel",
        moved=WINDOWS * ROW,
        macs=0,
        MTE2=32 * ROW / 55,
        V=7 * 32 * 6 * 128 / 64,
        MTE3=0,
    )


def test_cube_grad_input(small):
    """Runs of 64 rows and 5 slots: 0 to 7, then 8 with the 58 rows that are left, and 9, the second document.

    Slots with a window: 4 in run 0 (nothing starts before the document), 5 in runs 1 to 7, 3 in run 8 (windows 31
    to 33), none in run 9: 42 for 34 windows. 3 columns, 4 splits, 12 items: program p has split p of all columns.
    Split 0 has runs 0, 4, 8: 12 slots, 186 rows; split 1 runs 1, 5, 9: 10 slots, 148 rows; splits 2 and 3 two runs.
    """
    band_matrix, product, repair = small["cube"]["grad_input"]
    # the 64 x 16 matrix of each head is cut out of the band of 5 slots over their 4 * 16 + 32 rows
    assert_kernel(band_matrix, "band matrix", 2 * (6 * (5 * 96 + 64 * 16) * 2), 0)
    band = 2 * 64 * 16 * 2
    first, again = 12 * PAIR * 34 / 42, 12 * PAIR * 8 / 42
    assert_kernel(
        product,
        "grad_input_cube_kernel",
        moved=3 * ((WINDOWS + ROWS) * PAIR + band),
        macs=3 * 10 * 2 * 64 * 16 * 128,
        MTE2=3 * ((first + band / 4) / 32 + (again + band * 3 / 4) / 110),
        MTE1=3 * 3 * (band / 512 + 16 * PAIR / 256),
        M=3 * 3 * 2 * (4 * 1 * 8),
        FIX=3 * 186 * PAIR / 86,
    )
    # 10 runs on 8 vector cores: program 0 has runs 0 and 8, 7 slots, in two blocks of 16 slots
    assert_kernel(
        repair,
        "grad_input_repair_kernel",
        moved=WINDOWS * ROW,
        macs=0,
        MTE2=7 * ROW * 34 / 42 / 16 + 7 * ROW * 8 / 42 / 55,
        V=7 * 2 * 16 * 6 * 128 / 64,
        MTE3=0,
    )


def test_cube_grad_weight(small):
    """The forward's runs and items. Sums of an item: 400 x 32 for each of two heads, in fp32."""
    product, along_band, repair = small["cube"]["grad_weight"]
    sums = 2 * 400 * 32 * 4
    first, again = 400 * PAIR * 560 / 576 + 24 * PAIR, 400 * PAIR * 16 / 576
    assert_kernel(
        product,
        "grad_weight_cube_kernel",
        moved=3 * ((COVERED + WINDOWS) * PAIR + 2 * sums),
        macs=3 * 2 * 2 * 400 * 32 * 128,
        MTE2=2 * (first / 32 + again / 110),
        MTE1=2 * (400 * PAIR / 512 + 32 * PAIR / 256),
        M=2 * 2 * (25 * 2 * 8),
        FIX=2 * sums / 86,
    )
    # of the sums of 2 splits and 6 heads, 32 taps for each of 24 windows
    assert_kernel(along_band, "sum along the band", 2 * 6 * 24 * 32 * 4, 0)
    # 32 taps of 6 heads
    assert_kernel(repair, "grad_weight_repair_kernel", 32 * 6 * 2, 0)


def test_vector_forward(small):
    """34 windows on 8 programs: the busiest has 5. Windows load 34 * 32 = 1088 rows for 560."""
    (kernel,) = small["vector"]["forward"]
    loaded = 5 * 32 * ROW
    assert_kernel(
        kernel,
        "forward_vector_kernel",
        moved=(COVERED + WINDOWS) * ROW,
        macs=0,
        MTE2=loaded * 560 / 1088 / 16 + loaded * 528 / 1088 / 55,
        V=5 * 32 * 6 * 128 * 3 / 64,  # cast, multiply, add
        MTE3=5 * ROW / 64,
    )


def test_vector_grad_input(small):
    """Groups of 16 rows: 36 of the first document and 2 of the second, on 8 programs.

    Group 0 is in one window, groups 1 to 33 are in two, group 34 is in one, groups 35 to 37 are in none: 68 for 34
    windows. Program 1 has groups 1, 9, 17, 25, 33: 10 windows. Program 0 has 0, 8, 16, 24, 32: as many rows, all 80.
    """
    (kernel,) = small["vector"]["grad_input"]
    assert_kernel(
        kernel,
        "grad_input_vector_kernel",
        moved=(WINDOWS + ROWS) * ROW,
        macs=0,
        MTE2=10 * ROW * 34 / 68 / 16 + 10 * ROW * 34 / 68 / 55,
        # a window: cast its row, multiply and add it to 16 rows; at the end of a group, cast 16 rows
        V=(10 * (1 + 2 * 16) + 5 * 16) * 6 * 128 / 64,
        MTE3=80 * ROW / 64,
    )


def test_vector_grad_weight(small):
    """5 windows of the busiest of 8 programs, with 32 rows of x and one of dy each: in all 1122 for 594."""
    kernel, partial_sums = small["vector"]["grad_weight"]
    loaded = 5 * 33 * ROW
    assert_kernel(
        kernel,
        "grad_weight_vector_kernel",
        moved=(COVERED + WINDOWS) * ROW,
        macs=0,
        MTE2=loaded * 594 / 1122 / 16 + loaded * 528 / 1122 / 55,
        V=5 * (3 * 32 + 1) * 6 * 128 / 64,  # cast, multiply, add; cast dy
        MTE3=0,
    )
    assert_kernel(partial_sums, "sum of partial sums", 2 * 8 * 32 * 6 * 4, 0)


def test_items_of_unequal_splits(small):
    """On 5 cube cores program 0 of the forward takes items 0 and 5: the run of 24 windows, then that of 10."""
    _, product, _ = roofline.model(WORK, replace(SMALL, cube_cores=5), "cube")["forward"]
    assert product.cycles["FIX"] == pytest.approx((24 + 10) * PAIR / 86)


def test_several_turns_of_a_check(small):
    """A single vector core looks at 32 windows and then at 2, in two blocks of 32."""
    _, _, repair = roofline.model(WORK, replace(SMALL, cube_cores=1, vector_cores=1), "cube")["forward"]
    assert repair.cycles["MTE2"] == pytest.approx(34 * ROW / 110)
    assert repair.cycles["V"] == 7 * 2 * 32 * 6 * 128 / 64


def test_half_heads(monkeypatch):
    """At D 256 a column is one head, and in dInput half of one: 128 rows, 128 elements, fill half of L0C."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (570, 590))
    kernels = roofline.model(roofline.Workload(590, 5, 256, 32, 16), SMALL, "cube")
    _, product, _ = kernels["grad_input"]
    assert product.bytes == 5 * 2 * ((WINDOWS + ROWS) * 256 + 128 * 16 * 2)
    assert product.macs == 5 * 2 * 6 * 128 * 16 * 128  # halves; runs: 4 of 128 rows, one of 58, one of 20
    assert kernels["forward"][1].macs == 5 * 2 * 32 * 400 * 256


def test_more_slots_than_a_block(monkeypatch):
    """At D 16 a run has 1024 rows and 65 slots: dInput's check reads the 34 windows in 3 blocks of 16."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (570, 590))
    _, _, repair = roofline.model(roofline.Workload(590, 1, 16, 32, 16), SMALL, "cube")["grad_input"]
    assert repair.cycles["V"] == 7 * 3 * 16 * 16 / 64


def test_few_windows(monkeypatch):
    """Two windows: two vector cores work, which would draw 64 bytes a cycle each, were the way not 55."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (48,))
    work = roofline.Workload(48, 1, 128, 32, 16)
    (kernel,) = roofline.model(work, SMALL, "vector")["forward"]
    assert kernel.cycles["MTE2"] == pytest.approx(32 * 256 / 55)
    assert roofline.model(work, SMALL, "vector")["grad_weight"][1].bytes == 2 * 2 * 32 * 4
    # one item, one program: it would draw 128 bytes a cycle, were the way not 110; a tile has 40 windows, 656 rows
    _, product, _ = roofline.model(work, SMALL, "cube")["forward"]
    assert product.cycles["MTE2"] == pytest.approx((48 * 256 + 48 * 656 * 2) / 110)


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
    assert given["bytes"] == sum(kernel.bytes for kernel in everything)
    assert given["multiply_adds"] == sum(kernel.macs for kernel in everything)
    assert given["cycles"]["FIX"] == sum(kernel.cycles["FIX"] for kernel in everything if "FIX" in kernel.cycles)
    assert [kernel["name"] for kernel in given["kernels"]] == [kernel.name for kernel in everything]
    assert given["kernels"][4]["seconds"] == everything[4].seconds(SMALL)


def test_rates_are_those_of_the_platform_files():
    assert (rates.L2_READ, rates.FIX_WRITE, rates.UB_WRITE, rates.L1_TO_L0A, rates.L1_TO_L0B) == (110, 86, 64, 512, 256)
    assert rates.LANES * 4 == 256  # bytes


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
        x_limit = report.report(roofline.USUAL, B3, family)["x_limit"].values()
        assert f"| {family} | {' | '.join(f'{x:.2f}' for x in x_limit)} |" in text
    for block, stride in ((32, 16), (64, 16), (64, 32), (128, 16)):
        work = roofline.USUAL._replace(block=block, stride=stride)
        tile = accelerator.chip_of(B3).grad_input_tile(block, stride, work.heads, work.dim)
        table = WindowTable(roofline.documents(work.rows), block, stride, torch.device("cpu"))
        runs = RowRun(*table.row_runs(tile.rows).T)
        forward, grad_input = table.n_windows / work.rows, float((runs.end - runs.first).sum()) / work.rows
        assert f"| {block}/{stride} | {forward:.3f} | {grad_input:.3f} |" in text


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
