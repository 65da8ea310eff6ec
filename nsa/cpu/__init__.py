"""The CPU: native code where it can be built, else operators of PyTorch, which are slower; never in silence."""

import threading
import warnings
from functools import cache

import torch

from . import native, operators

_choosing = threading.Lock()


def forward(x, weight, table):
    return _backend().forward(x, weight, table)


def grad_input(dy, weight, table, n_rows):
    return _backend().grad_input(dy, weight, table, n_rows)


def grad_weight(dy, x, table):
    return _backend().grad_weight(dy, x, table)


def _backend():
    with _choosing:  # one thread builds, the others wait
        return _choice()


@cache
def _choice():
    try:
        native.library(torch.backends.cpu.get_cpu_capability())
    except native.BuildError as reason:
        warnings.warn(
            f"nsa_compress runs on operators of PyTorch, slower than its native code for CPUs: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return operators
    return native
