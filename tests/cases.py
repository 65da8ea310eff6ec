"""Legal calls: a case, its inputs and its exact results in fp64."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from hypothesis import strategies as st

from nsa import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIXTEENS = st.integers(1, 8).map(lambda i: 16 * i)


@dataclass(frozen=True)
class Case:
    lengths: tuple  # of the segments, in rows
    block: int
    stride: int
    n: int
    d: int
    dtype: torch.dtype = torch.bfloat16
    seed: int = field(default=0, repr=False)

    @cached_property
    def actual_seq_len(self):
        return list(accumulate(self.lengths))

    @property
    def geometry(self):
        return (self.block, self.stride)

    @cached_property
    def n_windows(self):
        return sum(max(0, 1 + (length - self.block) // self.stride) for length in self.lengths)

    @cached_property
    def inputs(self):
        """x (T, N, D), weight (block, N), dy (T', N, D)."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = ((sum(self.lengths), self.n, self.d), (self.block, self.n), (self.n_windows, self.n, self.d))
        return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(self.dtype) for s in shapes)

    def with_inputs(self, *inputs):
        """The same case with other numbers."""
        case = replace(self)
        case.__dict__["inputs"] = inputs
        return case

    @cached_property
    def exact(self):
        """y, dx, dw in fp64."""
        return _results(self, *(t.double() for t in self.inputs))

    @cached_property
    def magnitude(self):
        """The sums of the absolute values of the products that make y, dx and dw."""
        return _results(self, *(t.double().abs() for t in self.inputs))

    @property
    def terms(self):
        """How many products make an element of y, dx and dw, at most."""
        return self.block, -(-self.block // self.stride), max(1, self.n_windows * self.d)


def _results(case, x, weight, dy):
    x.requires_grad_()
    weight.requires_grad_()
    y = reference.nsa_compress(x, weight, *case.geometry, actual_seq_len=case.actual_seq_len)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@st.composite
def cases(draw, dtypes=DTYPES):
    """Every legal block, stride and D; segments short, empty, exact and long; N odd and even."""
    block = draw(SIXTEENS)
    stride = draw(SIXTEENS.filter(lambda stride: stride <= block))
    n, d = draw(st.sampled_from([1, 2, 3, 5, 8, 50, 127, 128])), 16 * draw(st.integers(1, 16))
    n = n if n * d <= 2048 else draw(st.integers(1, 8))
    length = st.one_of(
        st.sampled_from([0, 1, block - 1, block, block + stride - 1, block + stride]), st.integers(0, 3 * block)
    )
    lengths = draw(st.lists(length, min_size=1, max_size=5))
    lengths[0] = max(lengths[0], 1)  # a leading 0 is no legal prefix sum
    return Case(tuple(lengths), block, stride, n, d, draw(st.sampled_from(dtypes)), draw(st.integers(0, 99)))


NAMED = {
    "spec": Case((80, 96, 80), 64, 16, 8, 128, torch.float16),
    "one window": Case((32,), 32, 16, 1, 16),
    "row before a window": Case((31, 32), 32, 16, 2, 32),
    "empty segments": Case((64, 0, 0, 40, 0), 32, 16, 3, 48),
    "no window in the first segments": Case((5, 20, 100), 64, 48, 1, 64),
    "stride equals block": Case((100, 64), 32, 32, 5, 80),
    "stride does not divide block": Case((200, 77), 80, 48, 3, 112),
    "largest block": Case((300,), 128, 16, 2, 256),
    "most heads": Case((50,), 16, 16, 128, 16),
    "prime heads": Case((50, 33), 32, 16, 127, 16),
    "many short segments": Case((17, 32, 16, 5, 33) * 8, 16, 16, 2, 32),
    "largest": Case((140,), 128, 128, 128, 256),
}
