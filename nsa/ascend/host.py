"""Run kernels on the host CPU, by way of the very Linalg text that the Ascend compiler is fed.

    kernel --Triton--> TTIR --triton-ascend--> Linalg --bishengir-opt--> LLVM dialect --libtriton--> object --gcc--> .so

Inside `with host_driver():`, `kernel[grid](...)` takes CPU tensors, and each program of the grid runs natively. The
programs are spread over threads; a kernel with atomic operations has one thread, because the lowered code does them as
plain loads and stores. What differs from the chip: there is one memory, no pipes and no intrinsics, and sums of a block
run in the order of plain loops.
"""

import ctypes
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from triton._C import libtriton
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from nsa.files import why_refused

from . import assemble, library
from .compile import CompileError, tool
from .cpu_driver import CpuBackend, CpuDriver, active, cpu_tensor, types_of_arguments

NAME = "ascend-host"
RUNTIME = Path(__file__).with_name("host_runtime.c")
SOURCES = (RUNTIME, Path(__file__), Path(assemble.__file__), Path(library.__file__))  # of what becomes of a kernel
LOOPS = "convert-linalg-to-affine-loops"
# operands cut out of a block by extract_slice are views that affine loops do not take
PLAIN_LOOPS = "convert-linalg-to-loops"
PASSES = """
    inline symbol-dce convert-elementwise-to-linalg linalg-fuse-elementwise-ops eliminate-empty-tensors
    empty-tensor-to-alloc-tensor one-shot-bufferize=allow-return-allocs-from-loops=true canonicalize buffer-hoisting
    buffer-loop-hoisting {loops} lower-affine canonicalize cse convert-scf-to-cf expand-strided-metadata lower-affine
    arith-expand=include-bf16=true convert-arith-to-llvm convert-math-to-llvm convert-math-to-libm
    finalize-memref-to-llvm=use-generic-functions=true convert-func-to-llvm convert-cf-to-llvm convert-index-to-llvm
    reconcile-unrealized-casts
"""
C_TYPES = {"i1": "int8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t"}
# A function of host_runtime.c that gives the number whose bits are in a slot, and its C type. A call passes both 16-bit
# formats in the low bits of a vector register, so C's _Float16 serves for bf16 as well.
C_FLOATS = {
    "f16": ("_Float16", "as_half"),
    "bf16": ("_Float16", "as_half"),
    "f32": ("float", "as_float"),
    "f64": ("double", "as_double"),
}
# A scalar's Triton type: its own dtype, and the integer dtype of as many bits.
_FLOATS = {
    "fp16": (torch.float16, torch.int16),
    "bf16": (torch.bfloat16, torch.int16),
    "fp32": (torch.float32, torch.int32),
    "fp64": (torch.float64, torch.int64),
}
# Casts to a float type that round otherwise than to the nearest: bishengir-opt would lose the mode without a word.
_ROUNDED_CAST = re.compile(r"(hfusion\.cast) \{mode = #hfusion\.round_mode<(?!rint)\w+>\}.* -> tensor<(?:\d+x)*b?f\d+>")
# Its old value would be the new one where it succeeds: the lowered code copies it after the change.
_COMPARE_AND_SWAP = re.compile('GenericAtomicRMW = "(cas)"')
_OPERATION = re.compile(r'^\s*(?:%[\w:#, %]+ = )?"?([a-z_]\w*\.[\w.]+)', re.MULTILINE)  # %1 = math.erf ...


def _start_threads():
    global _threads
    _threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=NAME)


_start_threads()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_start_threads)  # a forked child has none of its parent's threads


@contextmanager
def host_driver() -> Iterator[None]:
    """Inside, Triton kernels run on CPU tensors; afterwards the driver that was active is so again.

    A kernel that cannot be compiled raises CompileError. One with @triton.autotune runs with its first configuration:
    none is timed, since times on the host say nothing of an NPU. Compiled kernels are kept where TRITON_CACHE_DIR or
    TRITON_HOME says, otherwise under NSA_CACHE_DIR; a library that other users could change raises RuntimeError.
    """
    with active(HostDriver()):
        yield


class HostBackend(CpuBackend):
    """Ends in a shared library."""

    name = NAME

    def __init__(self, target):
        super().__init__(target)
        self.binary_ext = "so"

    def last_stage(self, linalg, metadata):
        return build(linalg, metadata)

    def hash(self):
        return f"{self.target}-{[path.read_text() for path in SOURCES]}-{processor()}"


class HostDriver(CpuDriver):
    """One device, the CPU."""

    def __init__(self):
        super().__init__()
        self.launcher_cls = HostLauncher

    def get_current_target(self):
        return GPUTarget(NAME, "Ascend910B3", 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 30, "num_aicore": os.cpu_count(), "num_vectorcore": os.cpu_count()}

    def load_binary(self, name, binary, shared, device):
        """The library from the file that Triton keeps; `build` has made its folder a part of the name."""
        folder = _kept_in(name.split()[1])
        (path,) = folder.glob("*.so")
        if not folder.stat().st_mode & 0o077 and _is_open(path):
            path.chmod(0o644)  # nobody else could have reached it: `build` closed the folder before it was there
        reason = why_refused(path)
        if reason:
            raise RuntimeError(f"{path} is not loaded: {reason}")
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            remedy = "NSA_CACHE_DIR, or TRITON_CACHE_DIR where it is set, must name a folder where programs can run"
            raise OSError(f"{error}: {remedy}") from error
        return loaded, loaded.run_programs, 0, 0


class HostLauncher:
    """Calls a kernel's programs with the arguments that Triton hands over."""

    def __init__(self, source, metadata):
        self.types = types_of_arguments(source).values()
        self.most_threads = 1 if metadata.atomic else os.cpu_count()

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        values = [_slot(arg, type_) for arg, type_ in zip(args, self.types) if type_]
        slots = (ctypes.c_int64 * len(values))(*values)
        n_threads = min(x * y * z, self.most_threads)

        def run(first):
            function(slots, x, y, z, ctypes.c_int64(first), ctypes.c_int64(n_threads))

        list(_threads.map(run, range(n_threads)))


def _slot(arg, type_):
    """An argument of a Triton type as 64 bits: the address of a tensor, an integer, or the bits of a float."""
    if type_ in _FLOATS:
        dtype, bits = _FLOATS[type_]
        return torch.tensor(arg, dtype=dtype).view(bits).item()
    if not type_.startswith("*"):
        return arg
    return cpu_tensor(arg, "host_driver").data_ptr()


def build(linalg, metadata):
    """The shared library of a kernel, from its Linalg text."""
    name = re.search(r"func\.func @(\w+)", linalg).group(1)
    metadata["name"], metadata["shared"] = f"{name} {metadata['hash']}", 0
    metadata["atomic"] = "GenericAtomicRMW" in linalg
    kept_in = _kept_in(metadata["hash"])
    if _is_open(kept_in):
        kept_in.chmod(0o700)  # before the library is there
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text, missing = library.with_bodies(linalg.replace("gpu.barrier\n", "\n"))  # a program has one thread
        _refuse(missing + _ROUNDED_CAST.findall(linalg) + _COMPARE_AND_SWAP.findall(linalg))
        _to_llvm_dialect(text, folder)
        command = [
            sys.executable,
            "-I",
            assemble.__file__,
            libtriton.__file__,
            "kernel.llvm.mlir",
            "kernel.o",
            processor(),
        ]
        _run("llvm", command, folder)
        # all symbols must be found now: one that is missing when the kernel is called would end the process
        command = ["gcc", "-shared", "-fPIC", "-O2", *_definitions(name, linalg), RUNTIME, "kernel.o", "-o", "k.so"]
        _run("gcc", [*command, "-Wl,-z,defs", "-lm"], folder)
        return (folder / "k.so").read_bytes()


def _kept_in(hash):
    """Where Triton keeps what it makes of one kernel. It leaves folder and files as open as the umask does."""
    return Path(get_cache_manager(hash).cache_dir)


def _is_open(path):
    """Whether it is the user's, who can mend that, and others may write to it."""
    status = path.stat()
    return status.st_uid == os.geteuid() and status.st_mode & 0o022


def _to_llvm_dialect(linalg, folder):
    """Writes kernel.llvm.mlir, in which every operation is one of the LLVM dialect."""
    (folder / "kernel.ttadapter.mlir").write_text(linalg)
    loops = PLAIN_LOOPS if "tensor.extract_slice" in linalg else LOOPS
    flags = [f"--{flag}" for flag in PASSES.format(loops=loops).split()]
    if "hfusion." in linalg or "hivm." in linalg:
        flags = [f"--execution-engine-convert-{dialect}-to-upstream" for dialect in ("hfusion", "hivm")] + flags
    _run("bishengir-opt", [tool("bishengir-opt"), "kernel.ttadapter.mlir", *flags, "-o", "kernel.llvm.mlir"], folder)
    operations = set(_OPERATION.findall((folder / "kernel.llvm.mlir").read_text()))
    _refuse(sorted(name for name in operations if not name.startswith("llvm.") or name == "llvm.inline_asm"))


_NAMES = {
    "hfusion.cast": "tl.cast with fp_downcast_rounding",
    "cas": "tl.atomic_cas",
    "print": "tl.device_print",
    "assert": "tl.device_assert",
    "llvm.inline_asm": "tl.inline_asm_elementwise, assembly for one chip",
}


def _refuse(operations):
    """CompileError that names the operations, in Triton's words where they are known, if there are any."""
    if operations:
        named = []
        for operation in operations:
            called = re.sub(r"^triton_|_\d+$", "", operation)  # triton_print_0
            default = f"tl.{called}" if operation.startswith("triton_") else operation
            named.append(_NAMES.get(called, default))
        raise CompileError("host", f"{', '.join(dict.fromkeys(named))}: no native code for this on the host driver")


def processor():
    """The x86-64 level of this machine, a name LLVM knows."""
    if platform.machine() != "x86_64":
        raise RuntimeError(f"expected an x86-64 machine to run kernels on the host, got {platform.machine()}")
    known = set(re.search(r"flags\s*:(.*)", Path("/proc/cpuinfo").read_text()).group(1).split())
    if known >= {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}:
        return "x86-64-v4"
    return "x86-64-v3" if known >= {"avx2", "bmi2", "f16c", "fma"} else "x86-64"


def _definitions(name, linalg):
    """The kernel's C parameters, and the arguments made of the slots.

    A pointer is a 1-D memref, handed over as (allocated, aligned, offset, size, stride). The first two
    arguments are memrefs that kernels of one core leave alone, the last six the grid and the program.
    """
    signature = re.search(rf"func\.func @{name}\((.*?)\) attributes", linalg).group(1)
    types = re.findall(r"%arg\d+: ([^,){ ]+)", signature)
    parameters, arguments = [], []
    for i, type_ in enumerate(types[:-6]):
        slot = f"args[{i - 2}]" if i >= 2 else "0"
        if type_.startswith("memref"):
            parameters.append("void *, void *, int64_t, int64_t, int64_t")
            arguments.append(f"(void *){slot}, (void *){slot}, 0, INT64_MAX, 1")
        elif type_ in C_FLOATS:
            c_type, of_bits = C_FLOATS[type_]
            parameters.append(c_type)
            arguments.append(f"{of_bits}({slot})")
        elif type_ in C_TYPES:
            parameters.append(C_TYPES[type_])
            arguments.append(f"({C_TYPES[type_]}){slot}")
        else:
            raise CompileError("host", f"expected pointer, integer and float arguments, got {type_} in {name}")
    parameters.append(", ".join(["int32_t"] * 6))
    arguments.append("x, y, z, i_x, i_y, i_z")
    return [f"-DKERNEL={name}", f"-DPARAMETERS={', '.join(parameters)}", f"-DARGUMENTS={', '.join(arguments)}"]


def _run(stage, command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if "error:" in line or "undefined reference" in line] or lines[-1:]
        raise CompileError(stage, "\n".join(dict.fromkeys(said)) or f"ended with status {done.returncode}")


backends[NAME] = Backend(HostBackend, HostDriver)
