"""python -m nsa.ascend simulate, the reports that it prints, and its timelines."""

import io
import json
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from PIL import Image

from nsa.ascend import __main__ as command_line
from nsa.ascend import find_target
from nsa.ascend.simulator import checks, clock, op, simulate, timeline
from nsa.ascend.simulator.faults import Fault
from nsa.ascend.simulator.report import Report, critical_path
from nsa.ascend.simulator.trace import Operation

A2 = "Ascend910B3"
USUAL = ["simulate", "--target", A2, "--segments", "80,64", "--heads", "2", "--dim", "16"]


@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0) + 1, mask=o < n)


OWN = [
    "simulate",
    "--target",
    A2,
    "--kernel",
    f"{__name__}:add",
    "--signature",
    '{"x": "*bf16", "y": "*fp32", "n": "i32"}',
]
OWN += ["--sizes", '{"x": [2, 100], "y": [200], "n": 200}', "--constants", '{"BLOCK": 64}', "--grid", "4"]


def test_the_ops_kernels(capsys, tmp_path):
    trace, picture = tmp_path / "new" / "trace.json", tmp_path / "picture.png"
    code = command_line.main([*USUAL, "--trace", str(trace), "--plot", str(picture)])
    assert code == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    cube, vector = printed.split("cube family, total: ")
    for family, text in (("cube", cube), ("vector", vector)):
        for name in ("forward", "grad_input", "grad_weight"):
            assert f"result of {name}, {family} family: error " in text
    assert cube.count("checks passed  access outside, ") == cube.count(f" on {A2}, grid ") == 4
    kernels, others = 3, 2  # of dWeight: its sums over programs, and their rounding
    assert f"us beside {kernels} kernels and {others} operators of the framework at 15.4 us each" in vector
    assert "modelled" in vector
    assert vector.endswith("0 faults, 0 wrong results\n")
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["cat"] for event in events if event["ph"] == "X"} > {
        "forward_vector_kernel",
        "grad_weight_cube_kernel",
    }
    assert Image.open(io.BytesIO(picture.read_bytes())).size[0] == 1600


def test_one_family(capsys):
    assert command_line.main([*USUAL, "--family", "vector", "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out.count(" on Ascend910B3, grid ") == 3


def test_what_of_a5_is_not_simulated_is_named(capsys, tmp_path):
    """The cube kernels of forward and dInput are, which is no failure; with nothing simulated it is one."""
    usual = [*USUAL, "--target", "Ascend950PR_9589"]
    assert command_line.main([*usual, "--family", "cube"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("cube_kernel on Ascend950PR_9589, grid ") == 2
    for kernel in ("forward_repair", "grad_input_repair", "grad_weight_cube"):
        assert f"family: none, NOT SIMULATED: {kernel}_kernel: no simulation of hivm_regbaseintrins" in printed
    assert printed.endswith("0 faults, 0 wrong results, 3 calls NOT SIMULATED to their end\n")
    assert command_line.main([*usual, "--family", "vector", "--plot", str(tmp_path / "none.png")]) == 1
    assert not (tmp_path / "none.png").exists()


def test_a_wrong_result_and_a_fault_are_exit_code_1(capsys):
    results = op._results

    def others(*args):
        return tuple(result * 1.1 for result in results(*args))

    usual = [*USUAL, "--family", "vector"]
    with mock.patch.object(op, "_results", others):
        assert command_line.main(usual) == 1
    printed = capsys.readouterr().out
    assert printed.count("roundings: WRONG") == 3
    assert "0 faults, 3 wrong results" in printed
    with mock.patch.object(checks, "check", return_value=[Fault(checks.RACE, "here and there")]):
        assert command_line.main(usual) == 1
    printed = capsys.readouterr().out
    assert printed.count("  FAULT          race on chip: here and there") == 3
    assert "race on chip" not in printed.split("FAULT")[0]  # it is none of those that passed
    assert "result of forward, vector family: none: WRONG" in printed
    assert "3 faults, 3 wrong results" in printed


def test_anybodys_kernel(capsys):
    assert command_line.main(OWN) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("add on Ascend910B3, grid 4 x 1 x 1\n  checks passed  access outside, ")
    assert "  bytes          512 from memory, " in printed  # 200 of 2 bytes, in lines of 128
    assert " 800 written" in printed
    assert command_line.main([*OWN[:-1], "5,2"]) == 0
    assert "grid 5 x 2 x 1" in capsys.readouterr().out
    assert command_line.main([argument.replace("[200]", "[150]") for argument in OWN]) == 1
    assert "FAULT          access outside: block 2: " in capsys.readouterr().out


BAD = {
    "no such kernel": ([*OWN[:4], f"{__name__}:sub"], "expected a kernel as module:function, got"),
    "no module": ([*OWN[:4], "nowhere:add"], "No module named 'nowhere'"),
    "sizes": ([*OWN[:8], '{"x": [1]}'], "expected sizes for x, y, n, got them for x"),
    "a number for a tensor": ([*OWN[:8], '{"x": 3, "y": [3], "n": 3}'], "expected a list of sizes for x, "),
    "a list for a number": ([*OWN[:8], '{"x": [3], "y": [3], "n": [3]}'], "expected a number for n, a i32, got [3]"),
    "JSON": ([*OWN[:6], "x"], "--signature: expected JSON, got 'x'"),
    "no dictionary": ([*OWN[:6], "[1]"], "--signature: expected a dictionary, got '[1]'"),
    "segments": ([*USUAL, "--segments", "80,0"], "expected an integer of at least 1, got '0'"),
    "block": ([*USUAL, "--block", "8"], "must be a multiple of 16, got 8"),
    "trace to a folder": ([*USUAL, "--trace", "."], "--trace: expected a file, got the folder '.'"),
    "family": (
        [*USUAL, "--dtype", "fp32", "--family", "cube"],
        "expected family 'vector', or for fp16 and bf16 'cube'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_exit_code_2(name, capsys):
    arguments, message = BAD[name]
    try:
        code = command_line.main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


@pytest.fixture(scope="module")
def report():
    x, y = torch.randn(1000), torch.empty(1000)
    report = simulate(add, {"x": x, "y": y, "n": 1000, "BLOCK": 256}, (4,), A2)
    assert torch.equal(y, x + 1)
    return report


def test_a_report_as_data(report):
    data = json.loads(json.dumps(report.data()))
    assert (data["kernel"], data["target"], data["grid"], data["faults"]) == ("add", A2, [4, 1, 1], [])
    assert data["bytes"] == {"from_memory": 4096, "from_l2": 0, "written": 4000}
    assert data["memory_limit"] == pytest.approx(8096 / 1.15e12)
    assert data["seconds"] == pytest.approx(data["cycles"] / 1.8e9)
    assert "deadlock" in data["checks_passed"]
    assert sum(reason["share"] for reason in data["critical_path"]) == pytest.approx(1)


def test_a_trace_has_every_instruction(report):
    events = json.loads(timeline.chrome_trace([report, report]))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(names.values()) == ["AIV 0.0", "AIV 1.0", "AIV 2.0", "AIV 3.0"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * len(report.timing.spans)
    (load,) = [e for e in spans[: len(spans) // 2] if names[e["pid"]] == "AIV 0.0" and e["name"].startswith("load_gm")]
    (span,) = [s for s in report.timing.spans if s.core.index == 0 and s.operation.name == load["name"]]
    assert threads[load["tid"]] == "MTE2"
    assert load["ts"] == pytest.approx(span.start / 1800)
    assert load["dur"] == pytest.approx((span.end - span.start) / 1800)
    assert load["args"]["bytes"] == 2 * 256 * 4  # read and written
    assert load["args"]["line"] == span.operation.line
    task = report.timing.seconds * 1e6 + 15.4  # the second launch comes after the first
    assert spans[len(spans) // 2]["ts"] == pytest.approx(spans[0]["ts"] + task)


def test_a_picture(report):
    image = Image.open(io.BytesIO(timeline.plot([report])))
    assert image.format == "PNG"
    pixels = {colour: n for n, colour in image.convert("RGB").getcolors(1 << 20)}
    in_the_legend = 300  # at most
    assert pixels[31, 119, 180] > pixels[255, 127, 14] > in_the_legend  # matplotlib's first two: most time, second most


def planned(*instructions):
    """A report of one core. instructions: (pipe, start, end, what it waited for)."""
    core, spans, issued = clock.CoreName(0, "AIC", 0), [], []
    for line, (pipe, start, end, waited_for) in enumerate(instructions, 1):
        if waited_for and waited_for[0] == "flag":
            setter, flag = Operation("set", waited_for[1], "set_flag", line), (waited_for[1], pipe, 0)
            issued.append(setter)
            waited_for = ("flag", flag, setter)
        issued.append(Operation("run", pipe, f"do{line}", line))
        spans.append(clock.Span(core, pipe, start, end, issued[-1], waited_for))
    launch = mock.Mock(run=mock.Mock(traces=[mock.Mock(issued=issued)]))
    timing = clock.Timing(cycles=max(span.end for span in spans), spans=spans)
    return critical_path(Report(launch, find_target(A2), timing))


def test_critical_path_goes_back_from_the_last_instruction():
    """MTE2 brings a, M works on it; the third load has to wait until M releases the buffer. V is on no path."""
    path = planned(
        ("MTE2", 0, 40, None),
        ("M", 45, 65, ("flag", "MTE2")),
        ("V", 0, 30, None),
        ("MTE2", 70, 90, ("flag", "M")),
        ("MTE2", 90, 100, ("queue", "MTE2")),
    )
    assert path == [
        ("M waits for MTE2 to bring the data of line 2", 0.45),
        ("MTE2 waits for M to release the buffer of line 4", 0.25),
        ("MTE2 is busy with do4, line 4", 0.2),
        ("MTE2 is busy with do5, line 5", 0.1),
    ]


def test_critical_path_tells_the_memorys_rate_and_the_scalar_unit():
    path = planned(
        ("S", 0, 10, None),
        ("MTE2", 20, 80, ("bandwidth",)),
        ("MTE2", 80, 100, ("queue", "MTE2")),
    )
    assert path == [
        ("MTE2 shares the memory's rate with other cores in do2, line 2", 0.6),
        ("MTE2 is busy with do3, line 3", 0.2),
        ("the start, to line 2", 0.2),
    ]
    path = planned(("S", 0, 60, None), ("V", 60, 100, ("scalar",)))
    assert path == [("V waits for the scalar unit to come to line 2", 0.6), ("V is busy with do2, line 2", 0.4)]
