"""The ops in C++ (`native.cpp`), compiled with the machine's own compiler when they are first called."""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from ..files import cache_dir, write_aside

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
CAPABILITIES = {"AVX2": AVX2, "AVX512": AVX512}  # what PyTorch found the CPU to have; else the compiler's default


class BuildError(Exception):
    """Why there is no native code."""


class Problem(ctypes.Structure):
    """The struct of that name in `native.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "windows")),
        *((name, ctypes.c_int64) for name in ("segments", "block", "stride", "n", "d")),
        ("threads", ctypes.c_int),
    ]


def forward(x, weight, table):
    return _call("forward", x, weight, (table.n_windows, *x.shape[1:]), table)


def grad_input(dy, weight, table, n_rows):
    return _call("grad_input", dy, weight, (n_rows, *dy.shape[1:]), table)


def grad_weight(dy, x, table):
    return _call("grad_weight", dy, x, (table.block, x.shape[1]), table)


def _call(op, a, b, shape, table):
    out = torch.empty(shape, dtype=a.dtype)
    rows, windows = table.begins
    n, d = a.shape[1:]
    geometry = (len(rows) - 1, table.block, table.stride, n, d)
    problem = Problem(rows.data_ptr(), windows.data_ptr(), *geometry, torch.get_num_threads())
    function = getattr(library(torch.backends.cpu.get_cpu_capability()), f"{op}_{str(a.dtype).partition('.')[2]}")
    function(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, out)), ctypes.byref(problem))
    return out


@cache
def library(capability):
    """The ops compiled for what PyTorch found the CPU capable of, in some three seconds unless the cache has them;
    `BuildError` if that cannot be."""
    try:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        command = [*compiler, *FLAGS, *CAPABILITIES.get(capability, [])]
        parts = [*command, _run([*compiler, "--version"]), _run([*compiler, "-dumpmachine"]), SOURCE.read_text()]
        path = cache_dir() / f"cpu-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                built = Path(folder) / "native.so"
                _run([*command, str(SOURCE), "-o", str(built)])
                write_aside(path, built.read_bytes())
        return ctypes.CDLL(str(path))
    except (OSError, ValueError, RuntimeError) as error:  # a disk, a CXX of unbalanced quotes, a user without a home
        raise BuildError(f"it cannot be built, kept or loaded: {error}") from error


def _run(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr[:2000]}") from error
