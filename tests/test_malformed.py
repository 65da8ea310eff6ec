"""Thousands of calls with odd arguments: a legal one has the right result, any other one the exception it deserves.

`odd.py` has the arguments. The rules stand here once more, in Python's ints, which do not overflow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import odd
import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from odd import Odd

import nsa
from nsa import cpu, dropin, reference
from nsa.cpu import native, operators

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse.*beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, :UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    function: Callable
    tensors: tuple  # names of arguments, as in `arguments`
    results: tuple  # of "y", "dx", "dw"
    size: str = ""  # the argument that says how many rows the result has
    dtypes: tuple = HALF
    is_op: bool = False

    @property
    def names(self):
        return (*self.tensors, "block", "stride", "ends", *filter(None, [self.size]))

    def __call__(self, arguments):
        block, stride, ends = (arguments[name].value for name in ("block", "stride", "ends"))
        if not self.tensors:
            return self.function(ends, block, stride)
        size = {self.size: arguments[self.size].value} if self.size else {}
        return self.function(
            *(arguments[name].value for name in self.tensors), block, stride, actual_seq_len=ends, **size
        )


ops = torch.ops.nsa
TARGETS = {
    "nsa_compress": Target(nsa.nsa_compress, ("input", "weight"), ("y",), "n_windows"),
    "nsa_compress_grad": Target(dropin.nsa_compress_grad, ("grad_output", "input", "weight"), ("dx", "dw")),
    "count_windows": Target(nsa.count_windows, (), ()),
}
for name, tensors, result, size in (
    ("nsa_compress", ("input", "weight"), "y", "n_windows"),
    ("nsa_compress_grad_input", ("grad_output", "weight"), "dx", "n_rows"),
    ("nsa_compress_grad_weight", ("grad_output", "input"), "dw", ""),
):
    packet = getattr(ops, name)
    for function in (packet, packet.default, packet.offsets):
        TARGETS[str(function)] = Target(function, tensors, (result,), size, odd.KERNELS, True)


@cache
def legal_arguments(dtype):
    """Plain ones, by name."""
    case = Case((48, 0, 31, 33), 32, 16, 2, 16, dtype)
    shapes = {"input": (112, 2, 16), "weight": (32, 2), "grad_output": (case.n_windows, 2, 16)}
    plain = {
        name: (torch.arange(torch.Size(shape).numel()) * 7 % 5).view(shape).to(dtype) for name, shape in shapes.items()
    }
    plain.update(block=32, stride=16, ends=case.actual_seq_len, n_windows=case.n_windows, n_rows=112)
    return {name: Odd(value, value) for name, value in plain.items()}


@cache
def oddities(dtype, name):
    """What may come in the place of a legal argument."""
    right = legal_arguments(dtype)[name].value
    if isinstance(right, torch.Tensor):
        return list(odd.tensors(right).values())
    if name == "ends":
        return odd.ends(right)
    return [Odd(None, None if name in ("n_windows", "n_rows") else TypeError), *odd.ints(right)]


def deserved(target, arguments):
    """TypeError, which comes before all others, RuntimeError, or None for a legal call."""
    meanings = {name: arguments[name].meaning for name in target.names}
    if not target.tensors and isinstance(arguments["ends"].value, odd.Wrapper):
        return RuntimeError  # a plain int cannot come from what is behind it
    if TypeError in [meaning for meaning in meanings.values() if isinstance(meaning, type)]:
        return TypeError
    dtypes = {arguments[name].value.dtype for name in target.tensors}
    if len(dtypes) > 1 or not dtypes <= set(target.dtypes):
        return TypeError
    return (
        None if RuntimeError not in [*map(type_of, meanings.values())] and is_legal(target, meanings) else RuntimeError
    )


def type_of(meaning):
    return meaning if isinstance(meaning, type) else None


def is_legal(target, meanings):
    block, stride, ends = meanings["block"], meanings["stride"], meanings["ends"]
    if not 16 <= stride <= block <= 128 or block % 16 or stride % 16:
        return False
    if not ends or ends[0] <= 0 or list(ends) != sorted(ends) or ends[-1] >= 2**63:
        return False
    rows = {"input": ends[-1], "weight": block, "grad_output": windows(block, stride, ends)}
    given = {name: meanings[name].shape for name in target.tensors}
    if any(len(shape) != (2 if name == "weight" else 3) for name, shape in given.items()):
        return False
    heads, sizes = {shape[1] for shape in given.values()}, {shape[2] for shape in given.values() if len(shape) == 3}
    if len(heads) > 1 or not heads <= set(range(1, 129)) or len(sizes) > 1 or not sizes <= set(range(16, 257, 16)):
        return False
    size = {"n_windows": rows["grad_output"], "n_rows": rows["input"]}.get(target.size)
    return all(shape[0] == rows[name] for name, shape in given.items()) and meanings.get(target.size) in (None, size)


def windows(block, stride, ends):
    return sum(max(0, 1 + (end - begin - block) // stride) for begin, end in zip((0, *ends), ends))


def right_result(what, arguments):
    """ "y", "dx" or "dw". All sums are exact, and are rounded once."""
    block, stride, ends = as_int(arguments["block"]), as_int(arguments["stride"]), as_ints(arguments["ends"])
    geometry = {"actual_seq_len": ends}
    factors = {name: arguments[name].meaning for name in ("input", "weight", "grad_output")}
    x, weight, dy = (tensor.double() if isinstance(tensor, torch.Tensor) else None for tensor in factors.values())
    if what == "y":
        return reference.nsa_compress(x, weight, block, stride, **geometry)
    if what == "dx":
        x = weight.new_zeros(ends[-1], *dy.shape[1:])
    else:
        weight = x.new_zeros(block, x.shape[1])
    wanted = (x if what == "dx" else weight).requires_grad_()
    y = reference.nsa_compress(x, weight, block, stride, **geometry)
    return torch.autograd.grad(y, wanted, dy)[0]


def as_int(odd):
    """Also of what means no int and was taken by PyTorch's dispatcher, which converts more."""
    return int(odd.value) if isinstance(odd.meaning, type) else odd.meaning


def as_ints(odd):
    return [int(getattr(end, "real", end)) for end in odd.value] if isinstance(odd.meaning, type) else odd.meaning


def check(target, arguments):
    """Call, and compare with what the call deserves. Returns whether there was a result."""
    expected, error = deserved(target, arguments), None
    try:
        results = target(arguments)
    except (TypeError, RuntimeError) as caught:
        # without the frames: where PyTorch fails to print a tensor, one of them keeps torch.func switched off
        error = caught.with_traceback(None)
    words = f"{[arguments[name] for name in target.names]}: expected {expected}, got {type(error)}: {error}"
    if error is None:
        # PyTorch's dispatcher converts what is nearly an int
        assert expected is None or target.is_op, words
    elif target.is_op:
        assert expected or not is_native(target, arguments), words
    else:
        assert type(error) is expected, words
    if error is not None:
        return False
    if not target.tensors:
        assert results == windows(*(arguments[name].meaning for name in ("block", "stride", "ends")))
        return True
    dtype = arguments[target.tensors[0]].value.dtype
    for what, result in zip(target.results, results if isinstance(results, tuple) else (results,)):
        assert result.dtype == dtype
        assert result.is_contiguous()
        assert torch.equal(result.detach().as_subclass(torch.Tensor), right_result(what, arguments).to(dtype))
    if target.results == ("y",):
        check_gradients(results, arguments)
    return True


def check_gradients(y, arguments):
    wanted = {
        what: arguments[name].value
        for what, name in (("dx", "input"), ("dw", "weight"))
        if arguments[name].value.requires_grad
    }
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    dy = (torch.arange(y.numel()) % 4).view(y.shape).to(y.dtype)
    with_dy = {**arguments, "grad_output": Odd(dy, dy)}
    for what, grad in zip(wanted, torch.autograd.grad(y, wanted.values(), dy)):
        assert torch.equal(grad.as_subclass(torch.Tensor), right_result(what, with_dy).to(y.dtype))


def is_native(target, arguments):
    """Whether an op must take the ints as they are."""
    overload = getattr(target.function, "_overloadname", "")
    ends = arguments["ends"].value
    numbers = [arguments[name].value for name in ("block", "stride", *filter(None, [target.size]))]
    if isinstance(ends, torch.Tensor):
        return overload != "default" and all(type(number) is int for number in numbers)
    return overload != "offsets" and {int} == {type(number) for number in (*numbers, *ends)}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", TARGETS)
def test_one_odd_argument(name, dtype):
    target = TARGETS[name]
    plain = legal_arguments(dtype)
    took = [
        check(target, {**plain, argument: value}) for argument in target.names for value in oddities(dtype, argument)
    ]
    assert 10 < sum(took) < len(took) - 100


@st.composite
def odd_arguments(draw, target):
    dtypes = st.sampled_from(HALF)
    arguments = dict(legal_arguments(draw(dtypes)))
    for name in draw(st.lists(st.sampled_from(target.names), min_size=2, max_size=4, unique=True)):
        arguments[name] = draw(st.sampled_from(oddities(draw(dtypes), name)))
    return arguments


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150)
@given(data=st.data())
def test_several_odd_arguments(name, data):
    check(TARGETS[name], data.draw(odd_arguments(TARGETS[name])))


def arguments_of(**values):
    """Of a call of `nsa.nsa_compress`, with some that these functions make."""
    given = {name: odd.value for name, odd in legal_arguments(torch.float16).items()}
    given.update({name: make() for name, make in values.items()})
    call = (given["input"], given["weight"], given["block"], given["stride"])
    return call, {"actual_seq_len": given["ends"]}


X, WEIGHT = (legal_arguments(torch.float16)[name].value for name in ("input", "weight"))
# values are made in the test, since some of them warn
WORDS = [
    (
        {"input": lambda: odd.nested(X, torch.jagged)},
        RuntimeError,
        r"input must be .*torch.jagged.*\.values\(\) .*\.offsets\(\)\[1:\]\.cpu\(\)",
    ),
    (
        {"weight": lambda: odd.nested(WEIGHT, torch.jagged)},
        RuntimeError,
        "weight must be a plain tensor, got a nested tensor",
    ),
    (
        {"ends": lambda: odd.nested(torch.tensor([48, 112]), torch.jagged)},
        RuntimeError,
        "actual_seq_len must be .* nested",
    ),
    ({"input": lambda: odd.nested(X, torch.strided)}, RuntimeError, "torch.strided|'NestedTensor"),
    ({"input": lambda: X.to_sparse()}, RuntimeError, "got torch.sparse_coo|'Sparse"),
    ({"weight": lambda: WEIGHT.to_sparse_csr()}, RuntimeError, "got torch.sparse_csr|'SparseCsr"),
    ({"ends": lambda: torch.tensor([112]).to_sparse()}, RuntimeError, "got torch.sparse_coo|'Sparse"),
    ({"input": lambda: odd.Refuses(X)}, TypeError, "Refuses"),
    (
        {"input": lambda: odd.resized(X.clone(), 0)},
        RuntimeError,
        r"input of shape \(112, 2, 16\) must have 7168 bytes .*got 0",
    ),
    ({"input": lambda: odd.resized(X.clone(), 3)}, RuntimeError, "input .* must have 7168 bytes of memory, got 5376"),
    ({"input": lambda: odd.resized(odd.strided(X), 0)}, RuntimeError, "input .* bytes of memory, got 0"),
    (
        {"weight": lambda: odd.resized(WEIGHT.clone(), 0)},
        RuntimeError,
        r"weight .* must have 128 bytes of memory, got 0",
    ),
    ({"ends": lambda: odd.resized(torch.tensor([112]), 0)}, RuntimeError, "actual_seq_len .* must have 8 bytes"),
    ({"input": lambda: X[:1].expand(2**45, 2, 16), "ends": lambda: [2**45]}, RuntimeError, "memory"),
    (
        {"ends": lambda: torch.tensor([2**63 + 112], dtype=torch.uint64)},
        RuntimeError,
        "64 bits, got 9223372036854775920",
    ),
    (
        {"ends": lambda: torch.tensor([112], device="meta")},
        RuntimeError,
        "actual_seq_len must be on the CPU, got .* on meta",
    ),
    ({"input": lambda: X.to("meta")}, RuntimeError, "same device, got meta and cpu"),
    ({"input": lambda: None}, TypeError, "input must be a torch.Tensor, got NoneType"),
    ({"weight": lambda: None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"ends": lambda: None}, TypeError, "actual_seq_len must be .*, got NoneType"),
]
PUBLIC_WORDS = [
    (
        {"input": lambda: torch.quantize_per_tensor(X.float(), 0.5, 0, torch.quint8)},
        TypeError,
        "got torch.quint8 and torch.fl",
    ),
    ({"ends": lambda: np.ma.masked_array([48, 112], [1, 0])}, TypeError, "got a masked array of int64"),
    ({"ends": lambda: [np.timedelta64(112)]}, TypeError, "got an element of type timedelta64"),
    ({"ends": lambda: [48, -(2**70), 112]}, RuntimeError, f"must fit in 64 bits, got {-(2**70)}"),
    ({"ends": lambda: [48, *[2**70] * 70]}, RuntimeError, f"must fit in 64 bits, got {2**70}"),
    ({"block": lambda: 2**63}, RuntimeError, f"compress_block_size must fit in 64 bits, got {2**63}"),
    ({"stride": lambda: -(2**70)}, RuntimeError, f"compress_stride must fit in 64 bits, got {-(2**70)}"),
]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("values", "error", "words"), WORDS)
def test_words_of_function_and_op(values, error, words, gradients):
    call, ends = arguments_of(**values)
    for function in (nsa.nsa_compress, torch.ops.nsa.nsa_compress):
        with pytest.raises(error, match=words), torch.set_grad_enabled(gradients):
            function(*call, **ends)


@pytest.mark.parametrize(("values", "error", "words"), PUBLIC_WORDS)
def test_words_of_the_function(values, error, words):
    call, ends = arguments_of(**values)
    with pytest.raises(error, match=words):
        nsa.nsa_compress(*call, **ends)


@pytest.mark.parametrize(("values", "error", "words"), WORDS)
def test_in_inference_mode_the_function_refuses_the_same(values, error, words):
    """There an op does not pass its autograd kernel."""
    call, ends = arguments_of(**values)
    with torch.inference_mode(), pytest.raises(error, match=words):
        nsa.nsa_compress(*call, **ends)
    with torch.inference_mode(), pytest.raises(error):
        torch.ops.nsa.nsa_compress(*call, **ends)


def test_what_a_jagged_tensor_has_is_taken():
    jagged = odd.nested(X, torch.jagged)
    y = nsa.nsa_compress(jagged.values(), WEIGHT, 32, 16, actual_seq_len=jagged.offsets()[1:].cpu())
    assert torch.equal(y, reference.nsa_compress(jagged.values(), WEIGHT, 32, 16, actual_seq_len=[112, 224]))


@pytest.mark.parametrize("name", ["input", "weight"])
def test_memory_given_back_between_forward_and_backward(name):
    call, ends = arguments_of(input=X.clone().requires_grad_, weight=WEIGHT.clone().requires_grad_)
    y = nsa.nsa_compress(*call, **ends)
    {"input": call[0], "weight": call[1]}[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name} .* bytes of memory, got 0"):
        y.sum().backward()


def test_prefix_sums_made_in_inference_mode_serve_training():
    call, ends = arguments_of(input=X.clone().requires_grad_, ends=lambda: odd.inference(torch.tensor([48, 112])))
    nsa.nsa_compress(*call, **ends).sum().backward()
    assert call[0].grad.any()


def test_meta_tensors_with_prefix_sums_on_the_cpu():
    call, ends = arguments_of(
        input=lambda: X.to("meta"), weight=lambda: WEIGHT.to("meta"), ends=lambda: torch.tensor([48, 112])
    )
    for function in (nsa.nsa_compress, torch.ops.nsa.nsa_compress):
        y = function(*call, **ends)
        assert (y.device.type, y.shape) == ("meta", (5, 2, 16))


GRADIENTS = ((ops.nsa_compress_grad_input, (2, 1), "dx"), (ops.nsa_compress_grad_weight, (2, 0), "dw"))


@pytest.mark.parametrize("backend", [native, operators])
@pytest.mark.parametrize("dtype", odd.KERNELS)
@pytest.mark.parametrize("gap", [1, 2])
def test_no_other_memory_is_used(gap, dtype, backend, monkeypatch):
    """Tensors from an odd address on, all around them NaN, with `gap` 2 also between rows, heads and elements."""
    monkeypatch.setattr(cpu, "_backend", lambda: backend)
    x, weight, dy = (legal_arguments(torch.float16)[name].value for name in ("input", "weight", "grad_output"))
    memories, views = [], []
    for tensor in (x, weight, dy):
        shape = [gap * size for size in tensor.shape]
        count = torch.Size(shape).numel()
        memory = bytearray(b"\xff" * (dtype.itemsize * (count + 128) + 1))  # NaN in every dtype
        inside = torch.frombuffer(memory, dtype=dtype, offset=64 * dtype.itemsize + 1, count=count).view(shape)
        inside = inside[tuple(slice(None, None, gap) for _ in shape)].copy_(tensor)
        memories.append((memory, bytes(memory)))
        views.append(inside)
    ends = {"actual_seq_len": legal_arguments(torch.float16)["ends"].value}
    for op, factors, what in ((ops.nsa_compress, (0, 1), "y"), *GRADIENTS):
        result = op(*(views[i] for i in factors), 32, 16, **ends)
        assert torch.equal(result, right_result(what, legal_arguments(torch.float16)).to(dtype))
    assert all(memory == before for memory, before in memories)
