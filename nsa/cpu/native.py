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
LEVELS = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}  # other CPUs: the compiler's default


class BuildError(RuntimeError):
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
    """The ops compiled for what PyTorch finds the CPU capable of, in some three seconds unless the cache has them;
    `BuildError` if that cannot be."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, *FLAGS, *LEVELS.get(capability, [])]
    version = _run([*compiler, "--version"])
    key = hashlib.sha256("\n".join([*command, version, SOURCE.read_text()]).encode()).hexdigest()
    path = cache_dir() / f"cpu-{key[:32]}.so"
    try:
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                built = Path(folder) / "native.so"
                _run([*command, str(SOURCE), "-o", str(built)])
                write_aside(path, built.read_bytes())
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be written or loaded: {error}") from error


def _run(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr[:2000]}") from error
