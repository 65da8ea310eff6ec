"""Odd arguments: of each, the value that a call gets and what it means, or the exception that it deserves.

Tensors hold small whole numbers, so that every sum is exact and every correct result has the same bits.
"""

import enum
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

HUGE = (2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 + 48, 2**70, -1, -16, -(2**31), -(2**63), -(2**63) - 1, -(2**70))


@dataclass
class Odd:
    value: object
    meaning: object  # a plain tensor, an int, a list of ints; or the type of the exception

    def __repr__(self):
        value = self.value
        more = f"{value.dtype} {value.layout} {value.device}" if isinstance(value, torch.Tensor) else repr(value)
        return f"{type(value).__name__} {more}"


class Plain(torch.Tensor):
    pass


class WithFunction(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(torch.Tensor):
    """Has no memory of its own; calls see what is inside."""

    @staticmethod
    def __new__(cls, inside):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)
        wrapper.inside = inside
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda wrapper: wrapper.inside, (args, kwargs or {}))
        return func(*args, **kwargs)


class Refuses(torch.Tensor):
    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def unaligned(tensor):
    """The same, from an odd address on."""
    if not tensor.numel():
        return tensor
    memory = torch.frombuffer(bytearray(tensor.numel() * tensor.element_size() + 1), dtype=tensor.dtype, offset=1)
    assert memory.data_ptr() % 2
    return memory.view(tensor.shape).copy_(tensor)


def strided(tensor):
    """The same, backwards in its dimensions, with gaps, and not at the beginning of its memory."""
    wide = tensor.new_full((5, *(2 * size + 1 for size in reversed(tensor.shape))), 77)
    view = wide[3][tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.ndim)))
    return view.copy_(tensor)


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


def resized(tensor, part):
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() // 4 * part)
    return tensor


def nested(tensor, layout):
    return torch.nested.nested_tensor([tensor.clone(), tensor.clone()], layout=layout)


# of tensors of every kind: the same by other means
SAME = {
    "strided": strided,
    "unaligned": unaligned,
    "negated": lambda t: torch._neg_view(-t),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "inference": inference,
    "plain subclass": lambda t: t.as_subclass(Plain),
    "with __torch_function__": lambda t: t.as_subclass(WithFunction),
    "with __torch_dispatch__": Wrapper,
}
SPARSE_OR_NESTED = {
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(1, -1).to_sparse_csr(),
    "bsr": lambda t: t.new_ones(2, 2).to_sparse_bsr((1, 1)),
    "jagged": lambda t: nested(t, torch.jagged),
    "nested": lambda t: nested(t, torch.strided),
}
CUT = {
    "freed": lambda t: resized(t.clone(), 0),
    "cut": lambda t: resized(t.clone(), 3),
    "freed, strided": lambda t: resized(strided(t), 0),
}
QUANTISED = {
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.5, 0, torch.quint8),
    "quantised by channels": lambda t: torch.quantize_per_channel(
        t.float(), torch.ones(len(t)), torch.zeros(len(t)), 0, torch.qint8
    ),
}
NO_TENSORS = {
    "list": lambda t: t.tolist(),
    "array": lambda t: t.float().numpy(),
    "number": lambda t: 1.0,
    "None": lambda t: None,
    "string": lambda t: "tensor",
    "class": lambda t: torch.Tensor,
    "storage": lambda t: t.untyped_storage(),
}
DTYPES = tuple(dict.fromkeys(d for d in vars(torch).values() if isinstance(d, torch.dtype)))
KERNELS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def of_dtype(tensor, dtype):
    """The tensor in a dtype; uninitialised where PyTorch cannot convert to it."""
    try:
        return tensor.to(dtype)
    except (RuntimeError, TypeError):
        return torch.empty(tensor.shape, dtype=dtype)


def tensors(plain):
    """Every oddity of a tensor by name, for arguments that are to be fp16 or bf16."""
    odd = {name: Odd(make(plain), plain) for name, make in SAME.items()}
    zero = torch._efficientzerotensor(plain.shape, dtype=plain.dtype)
    odd["zero"] = Odd(zero, torch.zeros_like(plain))
    complex_ = torch.complex(plain.float(), -plain.float()).conj()
    odd["imaginary part of a conjugate"] = Odd(complex_.imag.to(plain.dtype), plain)
    odd["conjugate"] = Odd(complex_, TypeError)
    odd["expanded"] = Odd(plain[:1].expand(plain.shape), plain[:1].repeat(len(plain), *[1] * (plain.ndim - 1)))
    shapes = {
        "no row": plain[:0],
        "no element": plain[..., :0],
        "0-d": plain.flatten()[0],
        "one more dimension": plain[None],
        "one dimension less": plain.flatten(-2),
        "half": plain[..., : plain.shape[-1] // 2],
        "one row more": torch.cat([plain, plain[:1]]),
        "many": plain.repeat(*[1] * (plain.ndim - 1), 200),
    }
    odd.update({name: Odd(tensor, tensor) for name, tensor in shapes.items()})
    odd.update({name: Odd(make(plain), RuntimeError) for name, make in SPARSE_OR_NESTED.items()})
    odd.update({name: Odd(make(plain), TypeError) for name, make in (QUANTISED | NO_TENSORS).items()})
    for dtype in DTYPES:
        one = of_dtype(plain, dtype)
        odd[str(dtype)] = Odd(one, one if dtype in KERNELS else TypeError)
    return odd


class Number(enum.IntEnum):
    SIXTEEN, THIRTY_TWO = 16, 32


INT_TYPES = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.longlong)


def ints(right):
    """Oddities of an int."""
    odd = [Odd(kind(right), right) for kind in (int, *INT_TYPES)]
    odd += [Odd(member, int(member)) for member in Number]
    odd += [Odd(value, value) for value in (*HUGE, 0, right + 1, right - 1, 24, 160)]
    odd += [Odd(np.uint64(2**64 - 1), 2**64 - 1)]
    no_ints = [np.float16, np.float64, np.complex64, np.array, np.timedelta64, np.str_, Fraction, Decimal]
    no_ints += [float, complex, str, torch.tensor, lambda i: [i], lambda i: (i,), lambda i: torch.tensor([i])]
    odd += [Odd(kind(right), TypeError) for kind in no_ints]
    values = (True, False, np.True_, float("nan"), float("inf"), b"16", int, np.timedelta64("NaT"))
    odd += [Odd(value, TypeError) for value in values]
    return odd


def ends(right):
    """Oddities of prefix sums."""
    odd = [Odd(form(right), right) for form in (list, tuple, torch.Size)]
    odd += [Odd([kind(end) for end in right], right) for kind in INT_TYPES]
    array = np.array(right, np.int64)
    for kind in "bhilqBHILQ":
        for order in "<>":
            one = array.astype(np.dtype(kind).newbyteorder(order))
            odd += [Odd(one, right), Odd(one[::-1].copy()[::-1], right), Odd(np.repeat(one, 3)[1::3], right)]
    floats = [array.astype(kind) for kind in ("e", "f", "d", "g", "F", "D", "?", "O", "U", "S", "m8[s]")]
    odd += [Odd(one, TypeError) for one in (*floats, np.zeros(2, "V8"), np.zeros(2, [("end", int)]))]
    odd += [Odd(list(one), TypeError) for one in (*floats[:7], floats[-1])]
    odd += [Odd(np.ma.masked_array(array, array == right[0]), TypeError)]
    odd += [Odd(one, RuntimeError) for one in (array[None], array.reshape(-1, 1, 1))]
    odd += [Odd(np.array(right[-1]), RuntimeError), Odd(array[:0], [])]
    for wrong in (2**63, 2**64 - 1, 2**63 + right[-1]):
        for one in (np.array([*right[:-1], wrong], np.uint64), np.array([wrong, *right], ">u8")):
            odd += [Odd(one, [int(end) for end in one])]
        odd += [Odd(torch.tensor([*right[:-1], wrong], dtype=torch.uint64), [*right[:-1], wrong])]

    tensor = torch.tensor(right)
    odd += [Odd(of_dtype(tensor, dtype), right if dtype in INTEGERS else TypeError) for dtype in DTYPES]
    odd += [Odd(make(tensor), right) for make in SAME.values()]
    odd += [Odd(make(tensor[:, None]), RuntimeError) for make in SPARSE_OR_NESTED.values()]
    odd += [Odd(make(tensor), RuntimeError) for make in CUT.values()]
    odd += [Odd(make(tensor), TypeError) for make in QUANTISED.values()]
    odd += [Odd(tensor[-1:].expand(3), [right[-1]] * 3), Odd(tensor[:0], [])]
    odd += [Odd(one, RuntimeError) for one in (tensor[-1], tensor[None], tensor.to("meta"))]
    odd += [Odd(tensor[-1:].expand(2**power), RuntimeError) for power in (45, 59, 60, 62)]

    odd += [Odd(form(right), TypeError) for form in (dict.fromkeys, set, deque, iter, np.str_, bytes, bytearray)]
    odd += [Odd(range(right[-1], right[-1] + 1), TypeError), Odd(memoryview(array), TypeError)]
    odd += [Odd((end for end in right), TypeError), Odd(np.int64(right[-1]), TypeError)]
    odd += [Odd(value, TypeError) for value in (None, right[-1], "96", 1.5, float("nan"), object(), list)]
    inside = (None, 48.0, "48", True, np.True_, [48], float("nan"), 48j, np.array(48), torch.tensor(48), b"0")
    odd += [Odd([value, *right], TypeError) for value in (*inside, np.timedelta64(1), Fraction(48))]

    many = [right[-1]] * 70
    wrong = [[value, *right] for value in (*HUGE, 0)] + [[*right[:-1], value] for value in (*HUGE, 0)]
    wrong += [[*right, value, right[-1]] for value in HUGE] + [[*many, value] for value in HUGE]
    wrong += [[-(2**62), 2**62, right[-1]], [-(2**63), 2**63 - 1], [1, 2**63 - 1, -(2**63), right[-1]], [], right[::-1]]
    odd += [Odd(one, one) for one in wrong]
    odd += [Odd(np.array(one, np.int64), one) for one in wrong if all(-(2**63) <= end < 2**63 for end in one)]
    return [*odd, Odd([*right, *many], [*right, *many]), Odd(tuple(many), many)]
