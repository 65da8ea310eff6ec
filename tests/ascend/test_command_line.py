"""python -m nsa.ascend, as a person calls it."""

import json
import subprocess
import sys
from unittest import mock

import pytest

from nsa.ascend import __main__ as command_line

USUAL = ["--target", "Ascend910B3", "--block", "32", "--stride", "16", "--heads", "8", "--dim", "128"]
CORES = {"vector": "aiv", "fused": "mix", "cube": "aic", "repair": "aiv"}
KERNELS = [f"{what}_vector_kernel" for what in ("forward", "grad_input", "grad_weight", "append")]
KERNELS += ["forward_fused_kernel", "grad_input_fused_kernel", "grad_weight_cube_kernel", "grad_weight_repair_kernel"]


def test_compile_writes_every_stage_of_every_kernel(tmp_path):
    assert command_line.main(["compile", *USUAL, "--dtype", "bf16", "--out", str(tmp_path)]) == 0
    for kernel in KERNELS:
        assert "tt.func" in (tmp_path / f"{kernel}.ttir.mlir").read_text()
        assert "func.func" in (tmp_path / f"{kernel}.ttadapter.mlir").read_text()
        assert "hivm.hir" in (tmp_path / f"{kernel}.hivm.mlir").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: facts["core"] for name, facts in report["kernels"].items()} == {
        name: CORES[name.split("_")[-2]] for name in KERNELS
    }
    assert len(list(tmp_path.iterdir())) == 3 * len(KERNELS) + 1


def test_report(capsys):
    assert command_line.main(["report", *USUAL]) == 0
    printed = capsys.readouterr().out
    for words in (*KERNELS, "core          aiv", "UB", "of 196,608 bytes", "multi-buffer  yes", "notes         none"):
        assert words in printed


BAD = {
    "target": (["report", "--target", "H200"], "expected a target, one of Ascend910B1"),
    "no target": (["report"], "required: --target"),
    "block": (["report", "--target", "Ascend910B3", "--block", "17"], "must be a multiple of 16, got 17"),
    "number": (["report", "--target", "Ascend910B3", "--dim", "x"], "invalid int value: 'x'"),
    "dtype": (["report", "--target", "Ascend910B3", "--dtype", "int8"], "invalid choice: 'int8'"),
    "command": (["frobnicate"], "invalid choice: 'frobnicate'"),
    "option": (["report", *USUAL, "--fast"], "unrecognized arguments: --fast"),
    "sweep target": (["sweep", "--targets", "H200", "--out", "x.json"], "expected a target"),
    "no workers": (["sweep", "--workers", "0", "--out", "x.json"], "expected an integer of at least 1, got '0'"),
    "fewer workers": (["sweep", "--workers", "-1", "--out", "x.json"], "expected an integer of at least 1, got '-1'"),
    "sweep without a name": (["sweep", "--out", ""], "--out: expected a file, got ''"),
    "sweep to a folder": (["sweep", "--out", "."], "--out: expected a file, got the folder '.'"),
    "compile to the empty name": (["compile", *USUAL, "--out", ""], "--out: expected a folder, got ''"),
    "compile to a file": (["compile", *USUAL, "--out", __file__], "--out: expected a folder, got"),
    "roofline into a file": (["roofline", "--out", f"{__file__}/x"], "test_command_line.py is a file"),
    "where nobody writes": (["roofline", "--out", "/proc/x"], "--out: expected a folder, got '/proc/x': /proc: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_exit_code_2(name, capsys):
    arguments, message = BAD[name]
    never = mock.Mock(side_effect=AssertionError("work began before the arguments were checked"))
    with mock.patch.multiple(command_line, sweep=never, legal_grid=never, launches_of=never):
        try:
            code = command_line.main(arguments)
        except SystemExit as stop:
            code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


@pytest.mark.parametrize("package", ["triton", "xdsl"])
def test_missing_package_is_one_line_and_exit_code_2(package):
    code = f"import sys, runpy; sys.modules['{package}'] = None; runpy.run_module('nsa.ascend', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"nsa.ascend: the module {package} is missing: install nsa-ascend[ascend]"]


def test_missing_tool_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(command_line.pipeline.util, "find_spec", lambda name: None)
    assert command_line.main(["report", *USUAL]) == 2
    assert "install nsa-ascend[ascend]" in capsys.readouterr().err
