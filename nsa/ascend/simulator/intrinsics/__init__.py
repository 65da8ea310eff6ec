"""The intrinsics that a HIVM module calls, by name: which pipes they use, what they compute, what they demand.

The authority on each is the open template library of AscendNPU-IR, bishengir/lib/Template. A name is a pattern with
types left out, such as "nd2nz_{}": the arguments carry their types.
"""

import re

from ..faults import FaultError

TYPES = ("half", "bfloat16_t", "float", *(f"{u}int{bits}_t" for u in ("", "u") for bits in (8, 16, 32, 64)), "bool")
LIBRARY = "library"  # the event that library code keeps for itself
_TYPE = f"(?:{'|'.join(TYPES)})"
_patterns = []


def intrinsic(pattern):
    """Registers function(core, name, operands) for all names that `pattern` gives with types in place of {}."""

    def register(function):
        _patterns.append((re.compile(pattern.replace("{}", _TYPE)), function))
        return function

    return register


def call(name, core, operands):
    """Run the intrinsic of that name, which issues instructions to the core's pipes."""
    function = _find(name)
    if function is None:
        raise FaultError("unknown intrinsic", f"no simulation of {name}, called in line {core.line}")
    function(core, name, *operands)


_found = {}


def _find(name):
    if name not in _found:
        _found[name] = next((f for pattern, f in _patterns if pattern.fullmatch(name)), None)
    return _found[name]


def demand(core, name, what, holds):
    """A demand on addresses, sizes or strides that the template library asserts."""
    if not holds:
        raise FaultError("alignment", f"{name}, line {core.line}, demands {what}")


from . import cube, transfers, vector  # noqa: E402, F401  they register themselves
