"""What a type checker makes of programs that use the package as it is installed: `mypy --strict`."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nsa
import nsa.ascend
from nsa import dropin

ROOT = Path(__file__).parents[1]

RIGHT = """
import numpy as np
import torch

import nsa
from nsa import dropin, reference

ends = [80, 176, 256]


def compress() -> list[torch.Tensor]:
    x, w = torch.ones(256, 2, 16).bfloat16().requires_grad_(), torch.ones(64, 2).bfloat16()
    array, tensor = np.array(ends), torch.tensor(ends, dtype=torch.int32)
    results = [
        nsa.nsa_compress(x, w, 64, 16, actual_seq_len=ends),
        nsa.nsa_compress(x, w, 64, 16, actual_seq_len=tuple(ends)),
        nsa.nsa_compress(x, w, 64, 16, actual_seq_len=array),
        nsa.nsa_compress(x, w, 64, 16, actual_seq_len=np.cumsum([80, 96, 80])),
        nsa.nsa_compress(x, w, 64, 16, actual_seq_len=array.astype(np.int32), n_windows=7),
        nsa.nsa_compress(x, w, 64, 16, actual_seq_len=tensor),
        nsa.nsa_compress(x, w, 64, 16, actual_seq_len=tensor.tolist(), n_windows=None),
        nsa.nsa_compress(x, w, np.int64(64), np.int32(16), actual_seq_len=[np.int64(80), np.int64(256)]),
        nsa.nsa_compress(x, w, 64, 16, actual_seq_len=(np.int64(80), 176, 256)),
        reference.nsa_compress(x, w, 64, 16, actual_seq_len=ends),
    ]
    windows: int = nsa.count_windows(ends, 64, 16) + nsa.count_windows(array, 64, 16)
    windows += nsa.count_windows(tensor, 64, 16) + nsa.count_windows((80, np.int64(256)), 64, 16)
    dx, dw = dropin.nsa_compress_grad(torch.ones(7, 2, 16).bfloat16(), x, w, 64, 16, actual_seq_len=ends)
    pages, table = torch.ones(2, 128, 2, 16).bfloat16(), torch.tensor([[1, 0]])
    slots, length = torch.tensor([0], dtype=torch.int32), torch.tensor([80])
    cache: torch.Tensor = nsa.nsa_compress_infer(
        pages, w, slots, 64, 16, 128, block_table=table, actual_seq_len=[80], cache=torch.ones(1, 2, 16).bfloat16()
    )
    cache = nsa.nsa_compress_append(
        pages, w, table, 64, 16, np.int64(128), block_table=table, seq_len_before=length - 1, seq_len_after=length,
        cache=torch.ones(2, 8, 2, 16).bfloat16(), max_new_rows=1,
    )
    version: str = nsa.__version__
    print(windows, version, cache.shape)
    return [*results, dx, dw]


def of_torch_npu() -> None:
    with dropin.replace_torch_npu():
        pass
    replacement: dropin.Replacement = dropin.replace_torch_npu()
    replacement.restore()
"""

ASCEND = """
import torch

from nsa.ascend import (
    TARGETS, Artefacts, CompileError, Target, compile_kernel, find_target, host_driver, simulator_driver,
)
from nsa.ascend.emulated import emulate_npu
from nsa.ascend.hivm import overflow_of, transfers_of
from nsa.kernels import vector
from nsa.table import window_table


def on_the_host(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    emulate_npu()
    table = window_table((80, 176, 256), 64, 16, torch.device("cpu"))
    with host_driver():
        return vector.forward(x, w, table.starts, n_programs=40)


def on_a_chip(x: torch.Tensor, w: torch.Tensor) -> str:
    starts = window_table((80, 176, 256), 64, 16, torch.device("cpu")).starts
    with simulator_driver("Ascend910B3", check=True) as launches:
        vector.forward(x, w, starts, n_programs=40)
    return launches[0].kernel


def compiled(kernel: object) -> str:
    target: Target = find_target("Ascend910B3")
    cores: int = target.cube_cores + TARGETS["Ascend910B4"].vector_cores
    try:
        artefacts: Artefacts = compile_kernel(kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 1024}, target)
    except CompileError as error:
        print(error.stage, error.message, overflow_of(error.message), cores)
        raise
    print(artefacts.facts["switched_off"], transfers_of(artefacts.module), artefacts.notes[0])
    return artefacts.linalg
"""

# every line with "wrong" is to be reported, and no other one
WRONG = """
import numpy as np
import torch

import nsa
from nsa import dropin
from nsa.ascend import compile_kernel, find_target, host_driver

x, w, ends = torch.ones(32, 1, 16).half(), torch.ones(16, 1).half(), [32]
y = nsa.nsa_compress(x, w, 16, 16, actual_seq_len=ends)
nsa.nsa_compress(x, w, 16.0, 16, actual_seq_len=ends)  # wrong
nsa.nsa_compress(x, w, 16, "16", actual_seq_len=ends)  # wrong
nsa.nsa_compress(x, w, 16, 16)  # wrong
nsa.nsa_compress(x, w, 16, 16, ends)  # wrong
nsa.nsa_compress(x, w, 16, 16, actual_seq_len=None)  # wrong
nsa.nsa_compress(x, w, 16, 16, actual_seq_len=32)  # wrong
nsa.nsa_compress(x, w, 16, 16, actual_seq_len=[32.0])  # wrong
nsa.nsa_compress(x, w, 16, 16, actual_seq_len=(16, 32.0))  # wrong
nsa.nsa_compress(x, w, 16, 16, actual_seq_len=range(16, 48, 16))  # wrong
nsa.nsa_compress(x, w, 16, 16, actual_seq_len=np.zeros(1))  # wrong
nsa.nsa_compress(x, w, 16, 16, actual_seq_len=ends, n_windows=2.0)  # wrong
nsa.nsa_compress(x.numpy(), w, 16, 16, actual_seq_len=ends)  # wrong
nsa.nsa_compress([[1.0]], w, 16, 16, actual_seq_len=ends)  # wrong
rows: int = nsa.nsa_compress(x, w, 16, 16, actual_seq_len=ends)  # wrong
nsa.count_windows(ends, 16, 16.0)  # wrong
nsa.count_windows("32", 16, 16)  # wrong
dx, dw, db = dropin.nsa_compress_grad(y, x, w, 16, 16, actual_seq_len=ends)  # wrong
dropin.replace_torch_npu(None)  # wrong
find_target(910)  # wrong
compile_kernel(None, {"x": 16}, {}, find_target("Ascend910B3"))  # wrong
compile_kernel(None, {"x": "*bf16"}, {}, "Ascend910B3")  # wrong
host_driver(0)  # wrong
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Checks programs against the built wheel: (file, line) of all that mypy reports, and its whole output."""
    folder = tmp_path_factory.mktemp("types")
    built = ["--egg-base", folder, "build", "--build-base", folder / "build"]
    wheel = ["bdist_wheel", "--bdist-dir", folder / "bdist", "--dist-dir", folder]
    subprocess.run([sys.executable, "-W", "ignore", "setup.py", "-q", "egg_info", *built, *wheel], cwd=ROOT, check=True)
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as files:
        files.extractall(folder / "installed")

    def check(**programs):
        paths = [folder / f"{name}.py" for name in programs]
        for path, text in zip(paths, programs.values()):
            path.write_text(text)
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", folder / "cache", *paths]
        environment = {**os.environ, "PYTHONPATH": str(folder / "installed")}
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        found = re.findall(r"^(\w+)\.py:(\d+): error", run.stdout, re.MULTILINE)
        return {(name, int(line)) for name, line in found}, run.stdout + run.stderr

    return check


def test_programs(checked):
    """In one run, since reading torch takes most of it."""
    found, output = checked(right=RIGHT, ascend=ASCEND, wrong=WRONG)
    expected = {("wrong", i) for i, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}
    assert found == expected, output
    assert "errors in 1 file (checked 3 source files)" in output


def test_what_is_right_runs():
    namespace = {}
    exec(RIGHT, namespace)
    assert {tuple(result.shape[1:]) for result in namespace["compress"]()} == {(2, 16), (2,)}


def test_the_programs_have_every_public_name():
    for name in nsa.__all__:
        assert f"nsa.{name}" in RIGHT
    for name in nsa.ascend.__all__:
        assert re.search(rf"\b{name}\b", ASCEND.partition("def ")[2]), name
    for name in ("nsa_compress_grad", "replace_torch_npu", "Replacement"):
        assert hasattr(dropin, name)
        assert f"dropin.{name}" in RIGHT
