"""The Ascend toolchain without an NPU: compile the kernels up to HIVM, run the lowered code on the host."""

from importlib import util

from nsa.triton_ascend import check_toolchain, toolchain_fault

from .compile import Artefacts, CompileError, compile_kernel
from .targets import TARGETS, Target, find_target

__all__ = ["TARGETS", "Artefacts", "CompileError", "Target", "compile_kernel", "find_target", "host_driver"]


# Where torch_npu is, the op itself comes here for TARGETS, with any triton-ascend: no host driver unless asked for.
if util.find_spec("triton") and not util.find_spec("torch_npu") and not toolchain_fault():
    from . import host  # noqa: F401 -- so that Triton, where it finds no NPU and no GPU, says what to do: see NoDriver


def host_driver():
    """Context manager: inside, `kernel[grid](...)` runs on CPU tensors, see `nsa.ascend.host.host_driver`."""
    check_toolchain()
    from . import host  # needs triton-ascend, which a look at the targets does not

    return host.host_driver()
