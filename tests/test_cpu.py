"""What the CPU path promises beyond its numbers: threads, chunks, and where an infinity may go."""

import contextlib
from itertools import accumulate

import pytest
import torch
from cases import DTYPES, Case
from tolerance import assert_close

from nsa import cpu, reference

GRIDS = [(32, 16), (128, 16), (80, 48), (64, 64)]
compress = torch.ops.nsa.nsa_compress


def run(function, case, x, weight, dy):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, *case.geometry, actual_seq_len=case.actual_seq_len)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("block", "stride"), GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(dtype, block, stride):
    case = Case((700, 31, 0, 500, 333), block, stride, 8, 128, dtype)  # more than one chunk
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(run(compress, case, *case.inputs))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("block", "stride"), GRIDS)
@pytest.mark.parametrize("chunk", [1, 5000])
def test_chunks_do_not_show(monkeypatch, chunk, block, stride):
    case = Case((200, 31, 0, 150), block, stride, 3, 48, torch.float32)
    whole = run(compress, case, *case.inputs)
    monkeypatch.setattr(cpu, "PRODUCTS", chunk)
    monkeypatch.setattr(cpu, "ELEMENTS", chunk)
    *lines, dw = run(compress, case, *case.inputs)
    assert all(map(torch.equal, lines, whole))
    assert_close(dw, case.exact[2], case.magnitude[2], case.terms[2])


def kinds(tensor):
    """0 where finite; each infinity and NaN a number of its own."""
    return tensor.isposinf() + 2 * tensor.isneginf() + 3 * tensor.isnan()


@pytest.mark.parametrize(("block", "stride"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("i_input", range(3))
def test_what_is_not_finite_stays_where_the_reference_has_it(i_input, value, dtype, block, stride):
    lengths = (block + 2 * stride, block - 1, 16, 3 * block, block + 7, block)
    case = Case(lengths, block, stride, 2, 16, dtype)
    ends = list(accumulate(lengths))
    rows = {
        0: [0, ends[0] - 1, ends[0], ends[2] - 1, ends[3] - 1, ends[4] - 1],  # at the ends of segments
        1: [0, stride - 1, block - 1],
        2: [0, case.n_windows // 2, case.n_windows - 1],
    }[i_input]
    clean = run(compress, case, *case.inputs)
    for row in rows:
        inputs = [t.clone() for t in case.inputs]
        inputs[i_input].select(0, row)[0] = value  # one head: the other stays clean
        computed, expected = run(compress, case, *inputs), run(reference.nsa_compress, case, *inputs)
        for result, like, before in zip(computed, expected, clean):
            assert torch.equal(kinds(result), kinds(like))
            assert torch.equal(result[like.isfinite()], before[like.isfinite()])
