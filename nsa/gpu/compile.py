"""Compiles what a GPU would be launched, by Triton's own launch path.

A stand-in for Triton's driver names the GPU, and every launch stops where it would go to the device. So the
constants, numbers of warps and stages and the properties of arguments that Triton specialises on are the launchers'
and Triton's own. Tensors are on the device "meta", whose address 0 is a multiple of 16, as those of PyTorch's
allocator are.
"""

import subprocess
import tempfile
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nsa.accelerator import Machine
from nsa.ascend.launches import launch_all
from nsa.kernels import launch
from nsa.kernels.tiles import Gpu

from .assembly import amdgcn_facts, cubin_facts, ptx_facts

N_ROWS = 32768  # of the tensors: the benchmark's


def facts_of(shape, target):
    """For a `Shape` and a `Target`, the facts of every kernel that is launched, as a list of plain data."""
    with _compiling_for(target) as launches:
        launch_all(shape, machine_of(target), N_ROWS)
    return [
        {"target": target.name, "shape": str(shape), "kernel": name, **_facts(compiled, target)}
        for name, compiled in launches
    ]


def machine_of(target):
    """The `Machine` that `nsa.accelerator.machine_of` makes of the target's device."""
    programs = min(target.multiprocessors * launch.PROGRAMS_PER_MULTIPROCESSOR, launch.MAX_PROGRAMS)
    return Machine(programs, programs, Gpu())


@contextmanager
def _compiling_for(target):
    """Inside, launches add (name of the kernel, what it was compiled to or the error) to the list that comes back."""
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    stand_in = SimpleNamespace(
        get_current_target=lambda: gpu, get_current_device=lambda: gpu, get_current_stream=lambda device: None
    )
    launches, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        try:
            with redirect_stdout(None):  # where the assembler fails, Triton prints the whole assembly
                compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        except (TritonError, RuntimeError) as error:
            compiled = error
        launches.append((kernel.__name__, compiled))

    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(driver, "_active", stand_in):
        yield launches


def _facts(compiled, target):
    if isinstance(compiled, Exception):
        return {"error": str(compiled)}
    metadata, source = compiled.metadata, compiled.src
    facts = {
        "constants": {source.fn.arg_names[i]: str(value) for (i,), value in source.constants.items()},
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "shared": metadata.shared,
    }
    if target.backend == "hip":
        return facts | amdgcn_facts(compiled.asm["amdgcn"])
    arguments = [name for name, kind in source.signature.items() if kind != "constexpr"]
    return facts | cubin_facts(_resources(compiled.asm["cubin"])) | ptx_facts(compiled.asm["ptx"], arguments)


def _resources(cubin):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def versions():
    return {"triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version}
