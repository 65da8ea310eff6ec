"""The supported chips as one table of model constants. None of them was measured here.

Core counts and on-chip sizes: what `bishengir-compile` 1.2.0 prints in a module's header for the target (a
test compares). Clocks, L2 sizes and rates: the vendor's platform files of 910B1, 910B3, 910B4, 910_9392,
910_9362 and 950PR_9589. For the other chips these are *assumed* equal to the named sibling's.
"""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Target:
    """Sizes in bytes, per core; rates in bytes a cycle and core, but the DDR rate in bytes a second for all."""

    name: str
    generation: str  # A2, A3 or A5
    cube_cores: int
    vector_cores: int
    clock: float  # Hz
    l2: int
    ddr_read: float
    assumed_as: str = ""  # the chip whose clock, L2 and DDR rate were taken for want of this one's
    ub: int = 192 * KIB
    l1: int = 512 * KIB
    l0a: int = 64 * KIB
    l0b: int = 64 * KIB
    l0c: int = 128 * KIB

    @property
    def tools(self):
        """Suffix of the compiler's programs."""
        return "-a5" if self.generation == "A5" else ""

    @property
    def compile_class(self):
        """What a compilation depends on: targets with an equal class need one compilation."""
        return (self.tools, self.ub, self.l1, self.l0a, self.l0b, self.l0c)


_A5 = {"ub": 248 * KIB, "l0c": 256 * KIB}
_ROWS = (
    Target("Ascend910B1", "A2", 24, 48, 1850e6, 192 * MIB, 1.42e12),
    Target("Ascend910B2", "A2", 24, 48, 1850e6, 192 * MIB, 1.42e12, assumed_as="Ascend910B1"),
    Target("Ascend910B3", "A2", 20, 40, 1800e6, 192 * MIB, 1.15e12),
    Target("Ascend910B4", "A2", 20, 40, 1500e6, 96 * MIB, 0.96e12),
    Target("Ascend910_9362", "A3", 20, 40, 1500e6, 168 * MIB, 0.96e12),
    Target("Ascend910_9391", "A3", 24, 48, 1850e6, 192 * MIB, 1.42e12, assumed_as="Ascend910_9392"),
    Target("Ascend910_9392", "A3", 24, 48, 1850e6, 192 * MIB, 1.42e12),
    Target("Ascend950PR_9589", "A5", 32, 64, 1650e6, 128 * MIB, 1.64e12, **_A5),
)
TARGETS = {target.name: target for target in _ROWS}


def find_target(name):
    """The target of that name; ValueError with all names for any other."""
    if name not in TARGETS:
        raise ValueError(f"expected a target, one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def one_of_each_class(targets):
    """The first target of each compile class, and the names that it stands for."""
    classes = {}
    for target in targets:
        classes.setdefault(target.compile_class, []).append(target)
    return [(members[0], [member.name for member in members]) for members in classes.values()]
