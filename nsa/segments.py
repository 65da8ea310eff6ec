"""`actual_seq_len` in every form that callers have, brought to the two that the ops take: a list of ints, or an
integer tensor on the CPU."""

import numpy as np
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .contract import check_held, check_layout, check_memory, check_tensor, is_int

FORMS = "a tuple or list of ints, a 1-D integer array or a 1-D integer CPU tensor"
FEW = 64  # ints that are copied in no time
INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def prefix_sums(actual_seq_len, compact):
    """What to call an op with: a list of ints or an integer tensor; `compact` allows a tensor for a list.

    Raises TypeErrors as `nsa.nsa_compress` does, and RuntimeError for ints that an op cannot be given. All else that
    is wrong the op says, in its turn.
    """
    if isinstance(actual_seq_len, (tuple, list)):
        return _of_sequence(actual_seq_len, compact)
    ends = _of_array(actual_seq_len) if isinstance(actual_seq_len, np.ndarray) else actual_seq_len
    if not isinstance(ends, torch.Tensor):
        raise _type_error(ends)
    _check_dtype(ends)
    check_layout("actual_seq_len", ends)
    return ends


def _type_error(ends):
    return TypeError(f"actual_seq_len must be {FORMS}, got {type(ends).__name__}")


def _check_dtype(ends):
    if ends.dtype not in INTEGERS:
        raise TypeError(f"actual_seq_len must be {FORMS}, got a tensor of {ends.dtype}")


def check_ends_tensor(ends):
    """Raise unless a tensor can be `actual_seq_len`, whatever it holds."""
    _check_dtype(ends)
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
        check_ends_tensor(actual_seq_len)
        if isinstance(actual_seq_len, torch._subclasses.FakeTensor):
            return None
        check_memory("actual_seq_len", actual_seq_len)
        return _int64(actual_seq_len.contiguous().resolve_neg().numpy())
    if actual_seq_len is None:
        raise _type_error(actual_seq_len)
    return np.array(actual_seq_len, dtype=np.int64) if all(type(end) is int for end in actual_seq_len) else None


def suited_to(names, a, b, ends):
    """The ends, a list of ints or a tensor, in the form that suits an op's two tensors, which have these names."""
    if ends is None:  # PyTorch's dispatcher lets it pass for a tensor
        raise _type_error(ends)
    in_tensor = isinstance(ends, torch.Tensor)
    if in_tensor:
        check_layout("actual_seq_len", ends)
    if not (is_plain(a) and is_plain(b)):
        for name, tensor in zip(names, (a, b)):
            check_tensor(name, tensor)
            check_layout(name, tensor)
    elif not in_tensor and is_better_in_tensor(ends) and set(map(type, ends)) == {int}:
        return torch.from_numpy(np.array(ends, dtype=np.int64))
    return ends


def overload_for(packet, ends):
    """The one of an op's two overloads that takes the ends."""
    return packet.offsets if isinstance(ends, torch.Tensor) else packet.default


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
        for end in (min(ints), max(ints)):
            check_held("an element of actual_seq_len", end)
        raise
    return torch.from_numpy(array) if compact and is_better_in_tensor(ints) else list(ints)


def _of_scalars(scalars):
    for scalar in scalars:
        if scalar.ndim or scalar.dtype not in INTEGERS:
            got = f"an array of {scalar.dtype}, shape {tuple(scalar.shape)}"
            raise TypeError(f"actual_seq_len must be a tuple or list of ints, got {got} in it")
    return torch.stack([scalar.to(torch.int64) for scalar in scalars])


def _of_array(array):
    if torch.compiler.is_compiling():
        return torch.as_tensor(array).clone()  # as below
    if array.dtype.kind not in "iu" or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"actual_seq_len must be {FORMS}, got {_words_for(array)}")
    # a copy: what the gradients need later must not change with the array
    return torch.from_numpy(np.array(_int64(array)))


def _int64(array):
    """An integer array as int64."""
    if array.dtype.kind == "u" and array.size:
        check_held("an element of actual_seq_len", int(array.max()))
    return array.astype(np.int64, copy=False)


def _words_for(array):
    return f"{'a masked' if isinstance(array, np.ma.MaskedArray) else 'an'} array of {array.dtype}"
