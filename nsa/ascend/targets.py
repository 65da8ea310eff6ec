"""The chips that can be compiled for, and their model constants. None of them was measured here.

Names, core counts and on-chip sizes are those of the compiler, `bishengir-compile` 1.2.0: `nsa.ascend.chips` wrote
chips.csv, and a test compares. Clocks, L2 sizes and DDR rates are in the vendor's platform files of six chips. For
all others they are *assumed* to be those of the chip named in `assumed_as`.
"""

import csv
import re
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Target:
    """Sizes in bytes, per core; `ddr_read` in bytes a second for all cores together."""

    name: str
    generation: str | None  # A2, A3 or A5; None if the name does not tell
    cube_cores: int
    vector_cores: int
    clock: float  # Hz
    l2: int
    ddr_read: float
    ub: int
    l1: int
    l0a: int
    l0b: int
    l0c: int
    assumed_as: str = ""  # the chip whose clock, L2 and DDR rate were taken for want of this one's

    @property
    def tools(self) -> str:
        """Suffix of the compiler's programs."""
        return "-a5" if self.generation == "A5" else ""

    @property
    def compile_class(self) -> tuple[str, int, int, int, int, int]:
        """What a compilation depends on: targets with an equal class need one compilation."""
        return (self.tools, self.ub, self.l1, self.l0a, self.l0b, self.l0c)


# Ascend910B, with no number after it, is a chip of the first generation, before A2
_GENERATIONS = {r"Ascend910B\d": "A2", r"Ascend910_93": "A3", r"Ascend910_95": "A5", r"Ascend950": "A5"}
_RATES = {  # clock, L2, DDR rate
    "Ascend910B1": (1850e6, 192 * MIB, 1.42e12),
    "Ascend910B3": (1800e6, 192 * MIB, 1.15e12),
    "Ascend910B4": (1500e6, 96 * MIB, 0.96e12),
    "Ascend910_9362": (1500e6, 168 * MIB, 0.96e12),
    "Ascend910_9392": (1850e6, 192 * MIB, 1.42e12),
    "Ascend950PR_9589": (1650e6, 128 * MIB, 1.64e12),
}
_SIBLINGS = {  # of A2 and A3, with as many cores; all A5 chips take the one whose rates are known
    "Ascend910B2": "Ascend910B1",
    "Ascend910B2C": "Ascend910B1",
    "Ascend910B4-1": "Ascend910B4",
    "Ascend910_9372": "Ascend910_9362",
    "Ascend910_9381": "Ascend910_9392",
    "Ascend910_9382": "Ascend910_9392",
    "Ascend910_9391": "Ascend910_9392",
}


def generation_of(name):
    """A2, A3 or A5, from the first letters of a chip's name; None if they tell nothing."""
    return next((generation for prefix, generation in _GENERATIONS.items() if re.match(prefix, name)), None)


def _read_chips():
    with Path(__file__).with_name("chips.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            name = row.pop("name")
            sibling = "" if name in _RATES else _SIBLINGS.get(name, "Ascend950PR_9589")
            clock, l2, ddr_read = _RATES[sibling or name]
            rates = {"clock": clock, "l2": l2, "ddr_read": ddr_read, "assumed_as": sibling}
            yield Target(name, generation_of(name), **rates, **{field: int(value) for field, value in row.items()})


TARGETS: dict[str, Target] = {target.name: target for target in _read_chips()}
# What `sweep` and `roofline` take unless they are told otherwise: the six with known rates, and two of the others
MODELLED = {name: TARGETS[name] for name in sorted((*_RATES, "Ascend910B2", "Ascend910_9391"))}


def find_target(name: str) -> Target:
    """The target of that name; ValueError with all names for any other."""
    if name not in TARGETS:
        raise ValueError(f"expected a target, one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


@cache  # which makes it one warning a name
def target_of_device(name):
    """The target of the chip at hand, of any name. One that TARGETS lacks is taken for another, with a warning.

    It is taken for the chip with the smallest on-chip memory of its generation or, if its name tells none, of all:
    what fits there fits in the unknown one. Its core counts are then that chip's; the driver knows the real ones.
    """
    if name in TARGETS:
        return TARGETS[name]
    generation = generation_of(name)
    kind = [target for target in TARGETS.values() if generation in (None, target.generation)]
    least = min(kind, key=lambda target: target.compile_class[1:])
    warnings.warn(
        f"nsa_compress does not know the chip {name}: it cuts its tiles for the on-chip memory of {least.name}, the "
        f"smallest of {generation or 'all generations'}, which may cost speed",
        stacklevel=2,
    )
    return replace(least, name=name, generation=generation, assumed_as=least.name)


def one_of_each_class(targets):
    """The first target of each compile class, and the names that it stands for."""
    classes = {}
    for target in targets:
        classes.setdefault(target.compile_class, []).append(target)
    return [(members[0], [member.name for member in members]) for members in classes.values()]
