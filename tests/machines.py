"""Machines to run kernels as, where there is none."""

from triton.backends import backends

from nsa.accelerator import Machine
from nsa.ascend.targets import KIB
from nsa.kernels.tiles import Chip

A2 = Chip(l1=512 * KIB, l0c=128 * KIB, slices=True, sums=1)
A5 = Chip(l1=512 * KIB, l0c=256 * KIB, slices=False, sums=2)


def machine(programs, interpreted):
    """What this Triton runs on: an Ascend chip, a GPU for community Triton. Only Ascend compilers slice blocks."""
    chip = A5 if interpreted else A2
    return Machine(programs, programs, chip if "ascend" in backends else None)
