"""The Ascend toolchain without an NPU: compile the kernels up to HIVM, run the lowered code on the host."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compile import Artefacts, CompileError, compile_kernel
from .targets import TARGETS, Target, find_target

if TYPE_CHECKING:
    from .host import host_driver
    from .simulator.driver import simulator_driver

__all__ = [
    "TARGETS",
    "Artefacts",
    "CompileError",
    "Target",
    "compile_kernel",
    "find_target",
    "host_driver",
    "simulator_driver",
]
_DRIVERS = {"host_driver": ".host", "simulator_driver": ".simulator.driver"}


def __getattr__(name: str) -> Any:
    """The drivers only when they are asked for: they need a triton-ascend that they can drive, which a
    look at the targets does not."""
    if name in _DRIVERS:
        from nsa.triton_ascend import check_toolchain

        check_toolchain()
        return getattr(import_module(_DRIVERS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
