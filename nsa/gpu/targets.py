"""GPUs that the kernels are compiled for. Sizes are the vendors'; none of these GPUs has run the code."""

from typing import NamedTuple

KIB = 1024


class Target(NamedTuple):
    """An architecture as Triton names it, and the device that stands for it."""

    name: str
    device: str
    backend: str  # "cuda" or "hip"
    arch: int | str
    warp_size: int  # threads
    multiprocessors: int
    shared: int  # bytes of shared memory that a program may have


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", "cuda", 80, 32, 108, 163 * KIB),
        Target("sm_90", "H100", "cuda", 90, 32, 132, 227 * KIB),
        Target("sm_100", "B200", "cuda", 100, 32, 148, 227 * KIB),
        Target("gfx942", "MI300X", "hip", "gfx942", 64, 304, 64 * KIB),
    )
}


def find_target(name):
    """The `Target` of that name; ValueError if there is none."""
    if name not in TARGETS:
        raise ValueError(f"expected a target, one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]
