"""`actual_seq_len` in every form that callers have, brought to the two that the ops take: a list of ints, or an
integer tensor on the CPU."""

import numpy as np
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .contract import is_int

FORMS = "a tuple or list of ints, a 1-D integer array or a 1-D integer CPU tensor"
FEW = 64  # ints that are copied in no time


def prefix_sums(actual_seq_len, compact):
    """What to call an op with: a list of ints or an integer tensor; `compact` allows a tensor for a list.

    Raises TypeError and RuntimeError as `nsa.nsa_compress` does.
    """
    if isinstance(actual_seq_len, (tuple, list)):
        return _of_sequence(actual_seq_len, compact)
    ends = _of_array(actual_seq_len) if isinstance(actual_seq_len, np.ndarray) else actual_seq_len
    if not isinstance(ends, torch.Tensor):
        raise TypeError(f"actual_seq_len must be {FORMS}, got {type(ends).__name__}")
    check_tensor(ends)
    return ends if ends.dtype in (torch.int32, torch.int64) else ends.to(torch.int64)


def check_tensor(ends):
    """Raise unless a tensor can be `actual_seq_len`, whatever it holds."""
    if not _is_integer(ends.dtype):
        raise TypeError(f"actual_seq_len must be {FORMS}, got a tensor of {ends.dtype}")
    if ends.device.type != "cpu":
        raise RuntimeError(
            f"actual_seq_len must be on the CPU, got a tensor on {ends.device}: every call would wait for all work of "
            f"that device before it could read it. Keep the prefix sums on the CPU, where they were made, beside the "
            "copy that other ops need; or call .cpu() once for a batch, not in each layer"
        )
    if ends.ndim != 1:
        raise RuntimeError(f"actual_seq_len must have rank 1, got rank {ends.ndim}, shape {tuple(ends.shape)}")


def known_ends(actual_seq_len):
    """The ends that an op was called with, as an int64 array; None where a tracer hides some of them."""
    if isinstance(actual_seq_len, torch.Tensor):
        check_tensor(actual_seq_len)
        fake = isinstance(actual_seq_len, torch._subclasses.FakeTensor)
        return None if fake else actual_seq_len.numpy().astype(np.int64, copy=False)
    return np.array(actual_seq_len, dtype=np.int64) if all(type(end) is int for end in actual_seq_len) else None


def is_better_in_tensor(ints):
    """Whether they are so many that copying a list, in each step of a call and of its gradients, would take longer than
    to make a tensor once. Not where a mode of PyTorch looks on: a tensor would hide the ints from a tracer."""
    return len(ints) > FEW and not is_in_torch_dispatch_mode()


def is_plain(tensor):
    """Whether it is PyTorch's own kind of tensor. Others, as fake ones, may not go beside a tensor of lengths."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _of_sequence(sequence, compact):
    kinds = set(map(type, sequence))
    compiling = torch.compiler.is_compiling()
    for kind in kinds:
        if not is_int(kind) and not (compiling and kind is np.ndarray):
            raise TypeError(f"actual_seq_len must be a tuple or list of ints, got an element of type {kind.__name__}")
    if compiling and np.ndarray in kinds:  # what the compiler makes of numpy's integers
        return _of_scalars(list(map(torch.as_tensor, sequence)))
    if compiling or torch.SymInt in kinds:
        return list(sequence)
    ints = sequence if kinds == {int} else list(map(int, sequence))
    try:
        array = np.array(ints, dtype=np.int64)
    except OverflowError:
        raise RuntimeError(f"actual_seq_len must end in T, got {max(ints, key=abs)}, which no int64 holds") from None
    return torch.from_numpy(array) if compact and is_better_in_tensor(ints) else list(ints)


def _of_scalars(scalars):
    for scalar in scalars:
        if scalar.ndim or not _is_integer(scalar.dtype):
            got = f"an array of {scalar.dtype}, shape {tuple(scalar.shape)}"
            raise TypeError(f"actual_seq_len must be a tuple or list of ints, got {got} in it")
    return torch.stack([scalar.to(torch.int64) for scalar in scalars])


def _of_array(array):
    if torch.compiler.is_compiling():
        return torch.as_tensor(array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"actual_seq_len must be {FORMS}, got an array of {array.dtype}")
    # a copy: what the gradients need later must not change with the array
    return torch.from_numpy(np.array(array, dtype=np.int64))


def _is_integer(dtype):
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
