"""python -m nsa.gpu, as a person calls it."""

import json
import subprocess
import sys

import pytest
from triton import knobs

from nsa.gpu import __main__ as command_line

SMALL = ["--shapes", "16,16,1,16,fp32", "--targets", "sm_90", "gfx942", "--workers", "1"]


def test_report_is_a_table_and_a_file(tmp_path, capsys):
    out = tmp_path / "new" / "gpu.json"
    assert command_line.main(["report", *SMALL, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["what"] == "compiled, never run"
    assert list(results["targets"]) == ["sm_90", "gfx942"]
    names = [f"{what}_vector_kernel" for what in ("forward", "grad_input", "grad_weight", "append")]
    assert [(k["target"], k["kernel"]) for k in results["kernels"]] == [
        (t, k) for t in results["targets"] for k in names
    ]
    assert all(kernel["shape"] == "block 16 stride 16 N 1 D 16 fp32" for kernel in results["kernels"])
    header, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[:10]]
    forward = dict(zip(header, lines[0]))
    assert (forward["target"], forward["kernel"], forward["shapes"]) == ("sm_90", "forward_vector", "1")
    assert int(forward["registers"]) == results["kernels"][0]["registers"]
    assert [line[0] for line in lines] == ["sm_90"] * 4 + ["gfx942"] * 4
    assert [path.name for path in out.parent.iterdir()] == ["gpu.json"]  # nothing half-written is left


def test_a_kernel_that_does_not_compile_is_told_and_exit_code_1(tmp_path, capfd, monkeypatch):
    """An assembler that fails for one of three kernels."""
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(
        "#!/bin/sh\n"
        'for file; do [ -f "$file" ] && grep -q "entry grad_input" "$file" && echo broken >&2 && exit 1; done\n'
        f'exec {knobs.nvidia.ptxas.path} "$@"\n'
    )
    ptxas.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "gpu.json"
    assert command_line.main(["report", *SMALL[:4], "--workers", "1", "--out", str(out)]) == 1
    kernels = {kernel["kernel"]: kernel for kernel in json.loads(out.read_text())["kernels"]}
    assert "broken" in kernels["grad_input_vector_kernel"]["error"]
    assert kernels["grad_weight_vector_kernel"]["registers"] > 0
    printed = capfd.readouterr()
    assert "| 0, 1 failed |" in printed.out
    assert "entry grad_input" not in printed.out
    assert "grad_input_vector_kernel for sm_90, block 16 stride 16 N 1 D 16 fp32: " in printed.err


BAD = {
    "target": (["--targets", "sm_75"], "expected a target, one of sm_80, sm_90, sm_100, gfx942, got 'sm_75'"),
    "shape": (["--shapes", "32,16,8"], "expected a shape BLOCK,STRIDE,N,D,DTYPE with a dtype of"),
    "number": (["--shapes", "32,16,8,x,bf16"], "got '32,16,8,x,bf16'"),
    "dtype": (["--shapes", "32,16,8,128,int8"], "got '32,16,8,128,int8'"),
    "block": (["--shapes", "17,16,8,128,bf16"], "must be a multiple of 16, got 17"),
    "workers": (["--workers", "0"], "expected workers >= 1, got 0"),
    "folder": (["--out", "{folder}"], "expected a file to write, got the folder"),
    "no file": (["--out", ""], "expected a file to write, got the folder '.'"),
    "below a file": (["--out", "{file}/gpu.json"], "File exists"),
    "option": (["--fast"], "unrecognized arguments: --fast"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_exit_code_2_before_anything_is_compiled(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "report", None)
    (tmp_path / "file").touch()
    arguments, message = BAD[name]
    paths = {"folder": tmp_path, "file": tmp_path / "file"}
    try:
        code = command_line.main(["report", *(argument.format_map(paths) for argument in arguments)])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.modules['triton'] = None", "the module triton is missing: install nsa-ascend[cuda]"),
        (
            "os.environ['TRITON_INTERPRET'] = '1'",
            "expected kernels to compile, got interpreted ones: unset TRITON_INTERPRET",
        ),
    ],
)
def test_a_triton_that_cannot_is_one_line_and_exit_code_2(code, message):
    call = "sys.argv = ['nsa.gpu', 'report']; runpy.run_module('nsa.gpu', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys, runpy; {code}; {call}"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"nsa.gpu: {message}"]
