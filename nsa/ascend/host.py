"""Run kernels on the host CPU, by way of the very Linalg text that the Ascend compiler is fed.

    kernel --Triton--> TTIR --triton-ascend--> Linalg --bishengir-opt--> LLVM dialect --libtriton--> object --gcc--> .so

Inside `with host_driver():`, `kernel[grid](...)` takes CPU tensors, and each program of the grid runs
natively, the programs spread over threads. What differs from the chip: there is one memory, no pipes and no
intrinsics, and sums of a block run in the order of plain loops.
"""

import ctypes
import os
import platform
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from triton._C.libtriton import ir, llvm
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as active_driver

from nsa.kernels.triton_ascend import check_toolchain

from .compile import CompileError, tool

NAME = "ascend-host"
RUNTIME = Path(__file__).with_name("host_runtime.c")
LOOPS = "convert-linalg-to-affine-loops"
# operands cut out of a block by extract_slice are views that affine loops do not take
PLAIN_LOOPS = "convert-linalg-to-loops"
PASSES = """
    convert-elementwise-to-linalg linalg-fuse-elementwise-ops eliminate-empty-tensors empty-tensor-to-alloc-tensor
    one-shot-bufferize=allow-return-allocs-from-loops=true canonicalize buffer-hoisting buffer-loop-hoisting
    {loops} lower-affine canonicalize cse convert-scf-to-cf expand-strided-metadata lower-affine
    arith-expand=include-bf16=true convert-arith-to-llvm convert-math-to-llvm
    finalize-memref-to-llvm=use-generic-functions=true convert-func-to-llvm convert-cf-to-llvm convert-index-to-llvm
    reconcile-unrealized-casts
"""
C_TYPES = {"i1": "int8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t"}

check_toolchain()
_AscendBackend = backends["ascend"].compiler
_threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=NAME)


@contextmanager
def host_driver():
    """Inside, Triton kernels run on CPU tensors; afterwards the driver that was active is so again."""
    before = active_driver.active
    backends[NAME] = Backend(HostBackend, HostDriver)
    active_driver.set_active(HostDriver())
    try:
        yield
    finally:
        active_driver.set_active(before)
        if not isinstance(before, HostDriver):
            del backends[NAME]


class HostBackend(_AscendBackend):
    """triton-ascend's own stages up to Linalg, then a shared library."""

    @staticmethod
    def supports_target(target):
        return target.backend == NAME

    def __init__(self, target):
        super(_AscendBackend, self).__init__(target)
        self.npu = _AscendBackend(GPUTarget("npu", target.arch, target.warp_size))
        self.binary_ext = "so"

    def parse_options(self, opts):
        return self.npu.parse_options(opts)

    def add_stages(self, stages, options):
        npu = {}
        self.npu.add_stages(npu, options)
        stages["ttir"], stages["ttadapter"], stages["so"] = npu["ttir"], npu["ttadapter"], build

    def pack_metadata(self, metadata):
        return None

    def hash(self):
        return f"{self.target}-{RUNTIME.read_text()}-{PASSES}-{processor()}"


class HostDriver(DriverBase):
    """One device, the CPU."""

    def __init__(self):
        super().__init__()
        self.utils = self
        self.launcher_cls = HostLauncher

    @classmethod
    def is_active(cls):
        return False  # never by itself: only inside host_driver()

    def get_current_target(self):
        return GPUTarget(NAME, "Ascend910B3", 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise RuntimeError("kernels on the host are for correctness: their times say nothing of an NPU")

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 30, "num_aicore": os.cpu_count(), "num_vectorcore": os.cpu_count()}

    def load_binary(self, name, binary, shared, device):
        with tempfile.NamedTemporaryFile(suffix=".so") as file:  # stays loaded after the file is gone
            file.write(binary)
            file.flush()
            library = ctypes.CDLL(file.name)
        return library, library.run_programs, 0, 0


class HostLauncher:
    """Calls a kernel's programs with the arguments that Triton hands over."""

    def __init__(self, source, metadata):
        constants = source.constants
        self.taken = [name not in constants for name in source.signature]

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        values = [_slot(arg) for arg, taken in zip(args, self.taken) if taken]
        slots = (ctypes.c_int64 * len(values))(*values)
        n_threads = min(x * y * z, os.cpu_count())

        def run(first):
            function(slots, x, y, z, ctypes.c_int64(first), ctypes.c_int64(n_threads))

        list(_threads.map(run, range(n_threads)))


def _slot(arg):
    if not hasattr(arg, "data_ptr"):
        return arg
    tensor = getattr(arg, "host", arg)  # of the emulated NPU
    if tensor.device.type != "cpu":
        raise RuntimeError(f"expected CPU tensors inside host_driver(), got one on {tensor.device}")
    return tensor.data_ptr()


def build(linalg, metadata):
    """The shared library of a kernel, from its Linalg text."""
    name = re.search(r"func\.func @(\w+)", linalg).group(1)
    metadata["name"], metadata["shared"] = name, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "kernel.o").write_bytes(_assemble(_to_llvm_dialect(linalg, folder)))
        command = ["gcc", "-shared", "-fPIC", "-O2", *_definitions(name, linalg), RUNTIME, "kernel.o", "-o", "k.so"]
        _run("gcc", command, folder)
        return (folder / "k.so").read_bytes()


def _to_llvm_dialect(linalg, folder):
    (folder / "kernel.ttadapter.mlir").write_text(linalg)
    loops = PLAIN_LOOPS if "tensor.extract_slice" in linalg else LOOPS
    flags = [f"--{flag}" for flag in PASSES.format(loops=loops).split()]
    if "hfusion." in linalg or "hivm." in linalg:
        flags = [f"--execution-engine-convert-{dialect}-to-upstream" for dialect in ("hfusion", "hivm")] + flags
    _run("bishengir-opt", [tool("bishengir-opt"), "kernel.ttadapter.mlir", *flags, "-o", "kernel.llvm.mlir"], folder)
    return folder / "kernel.llvm.mlir"


def _assemble(path):
    context = ir.context()
    ir.load_dialects(context)
    llvm.init_targets()
    module = ir.parse_mlir_module(str(path), context)
    module.context = context  # the module lives no longer than its context
    llvm_module = llvm.to_module(module, llvm.context())
    llvm.optimize_module(llvm_module, llvm.OPTIMIZE_O3)
    return llvm.translate_to_asm(str(llvm_module), "x86_64-unknown-linux-gnu", processor(), "", [], False, True)


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
    types = re.findall(r"%arg\d+: ([^,){ ]+)", linalg[: linalg.index("attributes")])
    parameters, arguments = [], []
    for i, type_ in enumerate(types[:-6]):
        slot = f"args[{i - 2}]" if i >= 2 else "0"
        if type_.startswith("memref"):
            parameters.append("void *, void *, int64_t, int64_t, int64_t")
            arguments.append(f"(void *){slot}, (void *){slot}, 0, INT64_MAX, 1")
        elif type_ in C_TYPES:
            parameters.append(C_TYPES[type_])
            arguments.append(f"({C_TYPES[type_]}){slot}")
        else:
            raise CompileError("host", f"expected pointer and integer arguments, got {type_} in {name}")
    parameters.append(", ".join(["int32_t"] * 6))
    arguments.append("x, y, z, i_x, i_y, i_z")
    return [f"-DKERNEL={name}", f"-DPARAMETERS={', '.join(parameters)}", f"-DARGUMENTS={', '.join(arguments)}"]


def _run(stage, command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(stage, done.stderr)
