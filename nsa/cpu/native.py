"""The ops in C++ (`native.cpp`), compiled with the machine's own compiler when they are first called."""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from ..files import cache_lock, cached_files, write_cached

SOURCE = Path(__file__).with_name("native.cpp")
CPUINFO = Path("/proc/cpuinfo")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
DTYPES = ["float16", "bfloat16", "float32", "float64"]
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


class Pages(ctypes.Structure):
    """The struct of that name in `native.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("groups", "windows")),
        *((name, ctypes.c_int64) for name in ("row_size", "head", "y_head")),
    ]


def forward(x, weight, table):
    return _call("forward", x, weight, (table.n_windows, *x.shape[1:]), table)


def grad_input(dy, weight, table, n_rows):
    return _call("grad_input", dy, weight, (n_rows, *dy.shape[1:]), table)


def grad_weight(dy, x, table):
    return _call("grad_weight", dy, x, (table.block, x.shape[1]), table)


def append(pages, weight, filled, cache):
    """Write to `cache` the windows of a `pages.Filled`."""
    groups = torch.cat([filled.groups, filled.groups[-1:]])  # and one to prefetch
    places = Pages(groups.data_ptr(), filled.windows.data_ptr(), *pages.stride()[1:3], cache.stride(2))
    _launch("append", pages, weight, cache, filled.table, ctypes.byref(places))


def _call(op, a, b, shape, table):
    out = torch.empty(shape, dtype=a.dtype)
    _launch(op, a, b, out, table)
    return out


def _launch(op, a, b, out, table, *places):
    begins = table.begins
    rows, length = begins.data_ptr(), begins.shape[1]
    windows = rows + length * begins.element_size()
    n, d = a.shape[-2:]
    problem = Problem(rows, windows, length - 1, table.block, table.stride, n, d, torch.get_num_threads())
    function = _function(op, a.dtype, torch.backends.cpu.get_cpu_capability())
    missing = function(a.data_ptr(), b.data_ptr(), out.data_ptr(), ctypes.byref(problem), *places)
    if missing:
        raise RuntimeError(f"{op} of nsa_compress: not enough memory, {missing} bytes could not be allocated")


@cache
def _function(op, dtype, capability):
    return getattr(library(capability), f"{op}_{str(dtype).partition('.')[2]}")


@cache
def library(capability):
    """The ops compiled for what PyTorch found the CPU capable of, from the cache or in some five seconds; `BuildError`
    if that cannot be. Threads must take turns; processes do so by themselves."""
    try:
        return _load(_library_path(capability))
    except (OSError, ValueError, ImportError) as error:  # a disk, a CXX of unbalanced quotes, no fcntl
        raise BuildError(f"it cannot be built or kept: {error}") from error


def _library_path(capability):
    """Of a whole file that holds the ops, built if need be: by one process, while others that want it too wait."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    flags = [*FLAGS, *CAPABILITIES.get(capability, [])]
    options = [word for word in compiler if word.startswith(("-", "@"))]
    # the options that a user adds may ask for this very processor, as -march=native does
    processor = _processor() if options else ""
    runs_here = f"cpu-{_digest(SOURCE.read_text(), flags, options, platform.machine(), processor)}"
    try:
        version, macros = (
            _run([*compiler, "--version"]),
            _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]),
        )
        name = f"{runs_here}-{_digest(compiler, version, macros)}.so"
        path = _whole_file(name)
        if path is None:
            with cache_lock("cpu"):
                path = _whole_file(name) or write_cached(name, _sealed(_compile([*compiler, *flags])))
        return path
    except BuildError:  # without a compiler that works, what any other has made of this source will do
        path = _whole_file(f"{runs_here}-*.so")
        if path is None:
            raise
        return path


def _compile(command):
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "native.so"
        _run([*command, str(SOURCE), "-o", str(built)])
        return built.read_bytes()


def _load(path):
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{error}. Let NSA_CACHE_DIR name a folder from which programs may run") from error
    arguments = [*[ctypes.c_void_p] * 3, ctypes.POINTER(Problem)]
    for op, more in ((forward, []), (grad_input, []), (grad_weight, []), (append, [ctypes.POINTER(Pages)])):
        for dtype in DTYPES:
            function = getattr(loaded, f"{op.__name__}_{dtype}")
            function.restype, function.argtypes = ctypes.c_int64, [*arguments, *more]
    loaded.capability.restype = ctypes.c_char_p
    for struct, size in ((Problem, loaded.sizeof_problem), (Pages, loaded.sizeof_pages)):
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(struct):
            raise BuildError(f"{struct.__name__} has {size()} bytes in C++, {ctypes.sizeof(struct)} in Python")
    return loaded


def _sealed(content):
    """With a checksum behind, which the loader overlooks. A part of a library would end every process that loads it."""
    return content + hashlib.sha256(content).digest()


def _whole_file(pattern):
    """The newest of the cache whose checksum is right, or None."""
    for path in cached_files(pattern):
        content = path.read_bytes()
        size = len(content) - hashlib.sha256().digest_size
        if size > 0 and _sealed(content[:size]) == content:
            return path
    return None


def _digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _processor():
    """What Linux says of the processor: its kind and what it can do, not its clock or number."""
    if not CPUINFO.exists():
        return platform.processor()
    facts = {"vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU variant", "CPU part", "Features"}
    lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    return [line for line in lines if line.partition(":")[0].strip() in facts]


def _run(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr[:2000]}") from error
