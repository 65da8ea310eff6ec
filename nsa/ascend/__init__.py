"""The Ascend toolchain without an NPU: compile the kernels up to HIVM, run the lowered code on the host."""

from .compile import Artefacts, CompileError, compile_kernel
from .targets import TARGETS, Target, find_target

__all__ = ["TARGETS", "Artefacts", "CompileError", "Target", "compile_kernel", "find_target", "host_driver"]


def host_driver():
    """Context manager: inside, `kernel[grid](...)` runs on CPU tensors, see `nsa.ascend.host`."""
    from nsa.kernels.triton_ascend import check_toolchain

    check_toolchain()
    from . import host  # needs triton-ascend, which a look at the targets does not

    return host.host_driver()
