"""Kernels as they are launched on a machine, where there is none, and a check of what they compute."""

import torch
from tolerance import assert_close
from triton.backends import backends

from nsa import accelerator
from nsa.accelerator import Machine
from nsa.ascend.targets import KIB
from nsa.kernels.tiles import Chip, Gpu
from nsa.table import WindowTable

A2 = Chip(l1=512 * KIB, l0c=128 * KIB, fused=True, sums=1)
A5 = Chip(l1=512 * KIB, l0c=256 * KIB, fused=False, sums=2)


simulated = None  # the target of --kernels simulator


def machine(programs, interpreted):
    """What this Triton runs on: an Ascend chip, a GPU for community Triton. Only Ascend compilers slice blocks."""
    if simulated is not None:
        return Machine(programs, programs, accelerator.chip_of(simulated))
    chip = A5 if interpreted else A2
    return Machine(programs, programs, chip if "ascend" in backends else Gpu())


def run(case, guarded, family, machine):
    x, weight, dy = map(guarded.copy, case.inputs)
    table = WindowTable(case.actual_seq_len, *case.geometry, torch.device("cpu"))
    how = {"machine": machine, "family": family}
    y = accelerator.forward(x, weight, table, **how)
    dx = accelerator.grad_input(dy, weight, table, len(x), **how)
    dw = accelerator.grad_weight(dy, x, table, **how)
    guarded.check()
    return y, dx, dw


def check(case, guarded, family, machine):
    if case.n_windows == 0:  # the op launches nothing then
        return
    results = run(case, guarded, family, machine)
    for computed, exact, magnitude, terms in zip(results, case.exact, case.magnitude, case.terms):
        assert computed.dtype == case.dtype
        assert_close(computed, exact, magnitude, terms)
