"""The Ascend toolchain without an NPU: compile the kernels up to HIVM, run the lowered code on the host."""

from typing import TYPE_CHECKING, Any

from .compile import Artefacts, CompileError, compile_kernel
from .targets import TARGETS, Target, find_target

if TYPE_CHECKING:
    from .host import host_driver

__all__ = ["TARGETS", "Artefacts", "CompileError", "Target", "compile_kernel", "find_target", "host_driver"]


def __getattr__(name: str) -> Any:
    """host_driver only when it is asked for: it needs a triton-ascend that it can drive, which a
    look at the targets does not."""
    if name == "host_driver":
        from nsa.triton_ascend import check_toolchain

        check_toolchain()
        from .host import host_driver

        return host_driver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
