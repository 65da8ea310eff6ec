"""The CPU: native code where it can be built, else operators of PyTorch, which are slower; never in silence."""

import os
import threading
import warnings
from functools import cache

import torch

from . import native, operators
from .pages import filled

_choosing = threading.Lock()


def forward(x, weight, table):
    return _backend().forward(x, weight, table)


def grad_input(dy, weight, table, n_rows):
    return _backend().grad_input(dy, weight, table, n_rows)


def grad_weight(dy, x, table):
    return _backend().grad_weight(dy, x, table)


def append(pages, weight, table, before, after, slots, cache, stride, most_windows):
    found = filled(pages, table, before, after, slots, cache, len(weight), stride)
    if found is not None:
        _backend().append(pages, weight, found, cache)


def _backend():
    with _choosing:  # one thread builds, the others wait
        return _choice()


def _after_fork():
    """A forked child has no part in a build that another thread of its parent is at, and must not wait for its end."""
    global _choosing
    _choosing = threading.Lock()


if hasattr(os, "register_at_fork"):  # where there is fork
    os.register_at_fork(after_in_child=_after_fork)


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
