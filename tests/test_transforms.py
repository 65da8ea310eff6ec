"""torch.func, forward-mode differentiation and vmap."""

import weakref
from functools import partial
from unittest import mock

import pytest
import torch
from cases import Case
from tolerance import assert_close
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from nsa import cpu

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own, when forward mode is first used

compress = torch.ops.nsa.nsa_compress
grad_input = torch.ops.nsa.nsa_compress_grad_input
grad_weight = torch.ops.nsa.nsa_compress_grad_weight
SEQ = [20, 70]
LENGTHS = pytest.mark.parametrize("seq", [SEQ, torch.tensor(SEQ)], ids=["list", "tensor"])


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs():
    return numbers(70, 2, 16), numbers(32, 2, seed=1)


def matrix_of(x):
    """(T' * N * D, block * N) by loops: y = matrix @ weight, for SEQ, block 32, stride 16."""
    starts = [20, 36]
    matrix = torch.zeros(len(starts), 2, 16, 32, 2, dtype=x.dtype)
    for i_w, start in enumerate(starts):
        for n in range(2):
            matrix[i_w, n, :, :, n] = x[start : start + 32, n].t()
    return matrix.flatten(0, 2).flatten(1)


def call(x, weight, seq=SEQ):
    return compress(x, weight, 32, 16, actual_seq_len=seq)


@LENGTHS
def test_first_derivatives(seq):
    x, weight = inputs()
    matrix = matrix_of(x)
    torch.testing.assert_close(jacrev(lambda w: call(x, w, seq))(weight).reshape(matrix.shape), matrix)
    torch.testing.assert_close(jacfwd(lambda w: call(x, w, seq))(weight).reshape(matrix.shape), matrix)
    y, pullback = vjp(lambda x, w: call(x, w, seq), x, weight)
    dy = torch.ones_like(y)
    for got, expected in zip(
        pullback(dy),
        (grad_input(dy, weight, 32, 16, actual_seq_len=seq), grad_weight(dy, x, 32, 16, actual_seq_len=seq)),
    ):
        assert torch.equal(got, expected)
    both = grad(lambda x, w: call(x, w, seq).sum(), argnums=(0, 1))(x, weight)
    assert all(map(torch.equal, both, pullback(dy)))
    tangents = numbers(70, 2, 16, seed=2), numbers(32, 2, seed=3)
    _, tangent = jvp(lambda x, w: call(x, w, seq), (x, weight), tangents)
    torch.testing.assert_close(tangent, call(tangents[0], weight) + call(x, tangents[1]))


@LENGTHS
def test_second_derivatives(seq):
    """|y|^2 = |matrix @ w|^2 has the Hessian 2 matrix' @ matrix."""
    x, weight = inputs()
    matrix = matrix_of(x)
    expected = 2 * matrix.t() @ matrix

    def loss(w):
        return call(x, w, seq).square().sum()

    nested = [hessian(loss), jacrev(jacrev(loss)), jacfwd(jacfwd(loss)), jacrev(jacfwd(loss))]
    for function in nested:
        torch.testing.assert_close(function(weight).reshape(expected.shape), expected)
    v = numbers(32, 2, seed=2)
    torch.testing.assert_close(jvp(grad(loss), (weight,), (v,))[1].flatten(), expected @ v.flatten())


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # linearize's own
@LENGTHS
def test_linearize(seq):
    x, weight = inputs()
    y, tangent_of = linearize(lambda w: call(x, w, seq), weight)
    v = numbers(32, 2, seed=2)
    assert torch.equal(y, call(x, weight))
    torch.testing.assert_close(tangent_of(v), call(x, v))


@LENGTHS
def test_checks_of_pytorch(seq):
    x, weight = (t[:, :1].clone().requires_grad_() for t in inputs())
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(lambda x, w: call(x, w, seq), (x, weight), fast_mode=False, **options)
    assert gradgradcheck(lambda x, w: call(x, w, seq), (x, weight), check_fwd_over_rev=True, fast_mode=True)


def test_forward_mode_of_the_gradient_ops():
    x, weight = inputs()
    dy = numbers(2, 2, 16, seed=2)
    for op, *factors in ((grad_input, dy, weight), (grad_weight, dy, x)):
        bilinear = partial(op, compress_block_size=32, compress_stride=16, actual_seq_len=SEQ)
        (a, b), (ta, tb) = factors, (numbers(*t.shape, seed=3) for t in factors)
        torch.testing.assert_close(jvp(bilinear, (a, b), (ta, tb))[1], bilinear(ta, b) + bilinear(a, tb))
        torch.testing.assert_close(jvp(lambda a, f=bilinear, b=b: f(a, b), (a,), (ta,))[1], bilinear(ta, b))
        torch.testing.assert_close(jvp(lambda b, f=bilinear, a=a: f(a, b), (b,), (tb,))[1], bilinear(a, tb))


def test_forward_mode_keeps_nothing_for_later():
    """The factors that a tangent needs are freed with it."""
    x, weight = inputs()
    tangent, saved = numbers(70, 2, 16, seed=2), []
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), tangent)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            y = call(dual, weight)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, call(tangent, weight))
    gradient = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(gradient, grad_input(torch.ones_like(y), weight, 32, 16, actual_seq_len=SEQ))
    assert saved == [weight.shape]
    node = weakref.ref(x)
    del x, dual, y, gradient
    assert node() is None


class NoGradient(torch.autograd.Function):
    """Of nothing, where zeros would do."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return None


def test_backward_without_a_gradient_after_forward_mode():
    x, weight = inputs()
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(x.requires_grad_(), x.detach()), weight)
        y = forward_ad.unpack_dual(y).primal
    NoGradient.apply(y).sum().backward()
    assert x.grad is None


class Counted:
    """How often the CPU computes, and how many heads at once."""

    def __init__(self):
        self.heads = []

    def __enter__(self):
        def count(name):
            real = getattr(cpu, name)

            def counted(a, b, *rest):
                self.heads.append(a.shape[1])
                return real(a, b, *rest)

            return counted

        names = ("forward", "grad_input", "grad_weight")
        self.patch = mock.patch.multiple(cpu, **{name: count(name) for name in names})
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()


@LENGTHS
@pytest.mark.parametrize(("op", "rows"), [(compress, 70), (grad_input, 2)])
def test_a_batch_of_inputs_is_more_segments(op, rows, seq):
    batch, weight = numbers(5, rows, 2, 16), numbers(32, 2, seed=1)
    one = lambda a: op(a, weight, 32, 16, actual_seq_len=seq)  # noqa: E731
    for dim in range(4):
        with Counted() as counted:
            results = vmap(one, in_dims=dim)(batch.movedim(0, dim))
        assert counted.heads == [2]
        assert torch.equal(results, torch.stack([one(a) for a in batch]))


@LENGTHS
def test_other_batches_are_more_heads(seq):
    x, weight, dy = numbers(70, 2, 16), numbers(3, 32, 2, seed=1), numbers(3, 2, 2, 16, seed=2)
    xs = numbers(3, 70, 2, 16, seed=3)
    for op, a, b, in_dims in (
        (compress, x, weight, (None, 0)),
        (compress, xs, weight, (0, 0)),
        (grad_input, dy[0], weight, (None, 0)),
        (grad_input, dy, weight, (0, 0)),
        (grad_weight, dy, x, (0, None)),
        (grad_weight, dy[0], xs, (None, 0)),
        (grad_weight, dy, xs, (0, 0)),
    ):
        one = lambda a, b, op=op: op(a, b, 32, 16, actual_seq_len=seq)  # noqa: E731
        with Counted() as counted:
            results = vmap(one, in_dims=in_dims)(a, b)
        assert counted.heads == [6]
        parts = [one(*(t if d is None else t[i] for t, d in zip((a, b), in_dims))) for i in range(3)]
        torch.testing.assert_close(results, torch.stack(parts))


def test_no_more_heads_than_an_op_takes():
    x, weight = numbers(5, 40, 50, 16), numbers(5, 32, 50, seed=1)
    with Counted() as counted:
        results = vmap(lambda x, w: compress(x, w, 32, 16, actual_seq_len=[40]))(x, weight)
    assert counted.heads == [100, 100, 50]
    for result, a, b in zip(results, x, weight):
        torch.testing.assert_close(result, compress(a, b, 32, 16, actual_seq_len=[40]))


def test_no_window():
    x, weight = numbers(3, 20, 2, 16), numbers(32, 2)
    assert vmap(lambda x: compress(x, weight, 32, 16, actual_seq_len=[20]))(x).shape == (3, 0, 2, 16)
    dx = vmap(lambda dy: grad_input(dy, weight, 32, 16, actual_seq_len=[20]))(x[:, :0])
    assert torch.equal(dx, torch.zeros_like(x))


def test_gradients_per_sample():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(numbers(32, 2))

        def forward(self, x):
            return call(x, self.weight)

    layer, batch = Layer(), numbers(4, 70, 2, 16, seed=1)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    loss = lambda parameters, x: functional_call(layer, parameters, (x,)).square().sum()  # noqa: E731
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)["weight"]
    for got, x in zip(per_sample, batch):
        torch.testing.assert_close(got, torch.autograd.grad(layer(x).square().sum(), layer.weight)[0])


def test_half_precision_within_the_tolerance():
    case = Case((80, 96, 80), 32, 16, 3, 48, torch.bfloat16)
    x, weight, _ = case.inputs
    y = vmap(lambda x: compress(x, weight, 32, 16, actual_seq_len=case.actual_seq_len))(torch.stack([x, 2 * x]))
    assert_close(y[0], case.exact[0], case.magnitude[0], case.terms[0])
    assert torch.equal(y[1], 2 * y[0])


def test_batched_lengths_are_refused():
    x, weight = inputs()
    with pytest.raises(RuntimeError, match=r"must be the same for all of a batch of torch.vmap, got a batched tensor"):
        vmap(lambda seq: call(x, weight, seq))(torch.tensor([[20, 70], [30, 70]]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((5, 70, 3, 16), r"N = input.shape\[1\] = 3, got 2"), ((5, 70, 2, 24), "D must be"), ((5, 70, 2), "rank 3")],
)
def test_errors_name_what_one_part_has(shape, message):
    weight = numbers(32, 2)
    with pytest.raises(RuntimeError, match=message):
        vmap(lambda x: call(x, weight))(numbers(*shape))
    weights = numbers(5, 32, 2)
    with pytest.raises(RuntimeError, match=message):
        vmap(call)(numbers(*shape), weights)


@pytest.mark.parametrize(
    ("seq", "error", "message"),
    [
        (torch.tensor([20.5, 70.9]), TypeError, "got a tensor of torch.float32"),
        (torch.tensor([], dtype=torch.int64), RuntimeError, "at least one prefix sum"),
        (torch.tensor(70), RuntimeError, "must have rank 1, got rank 0"),
        (torch.tensor([20, 70], device="meta"), RuntimeError, "must be on the CPU"),
        (torch.tensor([-5, 70]), RuntimeError, "must be positive, got -5 at index 0"),
        ([70, 20, 70], RuntimeError, "got 70 then 20 at index 1"),
        ([20, 60], RuntimeError, "must equal T = input.shape.0. = 70, got 60"),
        (None, TypeError, "actual_seq_len must be .*, got NoneType"),
    ],
)
def test_lengths_of_a_batch_are_checked_as_those_of_a_part(seq, error, message):
    weight = numbers(32, 2)
    with pytest.raises(error, match=message):
        vmap(lambda x: call(x, weight, seq))(numbers(3, 70, 2, 16))


def test_sizes_of_a_batch_are_checked_as_those_of_a_part():
    weight = numbers(32, 2)
    with pytest.raises(RuntimeError, match="n_windows must be T' = 2, got 3"):
        vmap(lambda x: compress(x, weight, 32, 16, actual_seq_len=SEQ, n_windows=3))(numbers(3, 70, 2, 16))
    with pytest.raises(RuntimeError, match=r"grad_output must have T' = 2 rows, .*, got 4"):
        vmap(lambda dy: grad_input(dy, weight, 32, 16, actual_seq_len=SEQ))(numbers(3, 4, 2, 16))
    with pytest.raises(RuntimeError, match="at least one part, got none"):
        vmap(lambda x: call(x, weight))(numbers(0, 70, 2, 16))


COMPILED = {
    "jvp": lambda x, w, n: jvp(lambda w: call(x, w).sum() + w.sum(), (w,), (w,))[1],
    "jacfwd": lambda x, w, n: jacfwd(lambda w: call(x, w).sum((1, 2)))(w),
    "hessian": lambda x, w, n: hessian(lambda w: call(x, w).square().sum())(w),
    "grad": lambda x, w, n: grad(lambda w: call(x, w).square().sum())(w),
    "vmap": lambda x, w, n: vmap(lambda x: call(x, w))(torch.stack([x, 2 * x])),
    "per sample": lambda x, w, n: vmap(grad(lambda w, x: call(x, w).square().sum()), (None, 0))(
        w, torch.stack([x, 2 * x])
    ),
    "jvp, tensor": lambda x, w, n: jvp(
        lambda w: compress(x, w, 32, 16, actual_seq_len=torch.tensor(SEQ), n_windows=n).sum(), (w,), (w,)
    )[1],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    torch._dynamo.reset()
    x, weight = inputs()
    function = COMPILED[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, 2), function(x, weight, 2))


def test_a_compiled_batch_with_changed_lengths():
    torch._dynamo.reset()
    weight = numbers(32, 2)
    function = lambda xs, seq: vmap(lambda x: call(x, weight, seq))(xs)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for seq in ([30, 50, 70], [20, 40, 70], [1, 2, 70]):
        xs = numbers(4, 70, 2, 16)
        torch.testing.assert_close(compiled(xs, seq), function(xs, seq))
