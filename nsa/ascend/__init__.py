"""The Ascend toolchain without an NPU: compile the kernels up to HIVM, run the lowered code on the host."""

from .compile import Artefacts, CompileError, compile_kernel
from .host import host_driver
from .targets import TARGETS, Target, find_target

__all__ = ["TARGETS", "Artefacts", "CompileError", "Target", "compile_kernel", "find_target", "host_driver"]
