"""What the Triton drivers that run kernels on CPU tensors have in common: `host` and `simulator.driver`.

Each lowers a kernel by triton-ascend's own stages up to Linalg, and then has a stage of its own.
"""

import itertools
import os
import warnings
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from unittest import mock

import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.errors import CompilationError, MLIRCompilationError
from triton.runtime import driver as active_driver
from triton.runtime.cache import default_cache_dir
from triton.runtime.jit import JITFunction

from nsa.files import make_private, writable_cache_dir
from nsa.triton_ascend import check_toolchain, words_of

from .compile import CompileError

check_toolchain()
_AscendBackend = backends["ascend"].compiler


@contextmanager
def active(driver):
    """Triton launches kernels through this driver; afterwards the one that was active is so again."""
    before = active_driver.active
    active_driver.set_active(driver)
    try:
        with mock.patch.object(JITFunction, "run", _with_compile_errors(JITFunction.run)), _kept_kernels():
            yield
    finally:
        active_driver.set_active(before)


def _with_compile_errors(run):
    """JITFunction.run, with one kind of error for all stages in place of Triton's two."""

    @wraps(run)
    def wrapper(*args, **kwargs):
        try:
            return run(*args, **kwargs)
        except CompilationError as error:
            raise CompileError("ttir", str(error)) from error
        except MLIRCompilationError as error:
            cause = error.__context__  # what the stage itself raised, which Triton frames in lines of its own
            if isinstance(cause, CompileError):
                raise cause from None
            raise CompileError(error.stage_name, words_of(cause)) from cause

    return wrapper


@contextmanager
def _kept_kernels():
    """Triton keeps compiled kernels in the cache of this package, unless the user has chosen a place.

    The folder is made here if it is missing: Triton would make it with what the umask leaves, as open as that is.
    """
    chosen = os.environ.get("TRITON_CACHE_DIR", "").strip() or (os.environ.get("TRITON_HOME") and default_cache_dir())
    folder = Path(chosen or writable_cache_dir() / "triton")
    make_private(folder)
    if chosen:
        yield
        return
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before


class CpuBackend(_AscendBackend):
    """triton-ascend's own stages up to Linalg, then `last_stage(linalg, metadata)`, which gives the binary."""

    name = None  # of the GPUTargets that it compiles for; this class compiles for none

    @classmethod
    def supports_target(cls, target):
        return target.backend == cls.name

    def __init__(self, target):
        super(_AscendBackend, self).__init__(target)
        self.npu = _AscendBackend(GPUTarget("npu", target.arch, target.warp_size))

    def parse_options(self, opts):
        return self.npu.parse_options(opts)

    def add_stages(self, stages, options):
        npu = {}
        self.npu.add_stages(npu, options)
        stages["ttir"], stages["ttadapter"], stages[self.binary_ext] = npu["ttir"], npu["ttadapter"], self.last_stage

    def pack_metadata(self, metadata):
        return None


class CpuDriver(DriverBase):
    """One device, which is never active by itself: only inside `active`."""

    def __init__(self):
        super().__init__()
        self.utils = self

    @classmethod
    def is_active(cls):
        return False

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        return first_configuration()


class NoDriver(DriverBase):
    """What Triton finds outside of these drivers where there is neither an NPU nor a GPU.

    @triton.autotune asks for a benchmarker when a kernel is decorated, so decorating works; calling says what to do.
    """

    @classmethod
    def is_active(cls):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton has just asked them, and their warnings are out
            return not any(backend.driver.is_active() for backend in backends.values() if backend.driver is not cls)

    def get_benchmarker(self):
        return first_configuration()

    def get_current_device(self):
        raise RuntimeError(
            "Triton finds no NPU and no GPU: to run a kernel on CPU tensors, call it inside "
            "`with nsa.ascend.host_driver():`"
        )

    get_current_target = get_current_device

    def get_current_stream(self, device):
        self.get_current_device()


def first_configuration():
    """For @triton.autotune: a benchmarker that runs nothing, and gives each configuration more time than the last."""
    times = itertools.count()
    return lambda kernel_call, quantiles: [next(times)] * len(quantiles)


def types_of_arguments(source):
    """The Triton type of each argument of a call, in order; None for one that the kernel was compiled for."""
    names = [name for name in source.fn.arg_names if name in source.signature]
    return {name: None if name in source.constants else source.signature[name] for name in names}


def cpu_tensor(arg, inside):
    """The tensor on the CPU behind an argument that is to be a pointer; `inside` is the driver's name for messages."""
    tensor = getattr(arg, "host", arg)  # of the emulated NPU
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"expected a tensor, or a number of Python's own, got {type(arg).__module__}.{type(arg).__name__}"
        )
    if tensor.device.type != "cpu":
        raise RuntimeError(f"expected CPU tensors inside {inside}(), got one on {tensor.device}")
    return tensor


backends["none"] = Backend(CpuBackend, NoDriver)
