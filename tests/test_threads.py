"""Many threads at once, forward and backward, share tables, the library and the graph's own threads."""

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from cases import Case

import nsa
from nsa import table

THREADS = 8
FORMS = (list, tuple, np.array, torch.tensor)


def drawn_cases(count):
    """With other lengths, sizes and dtypes each."""
    draw = random.Random(0)
    for i in range(count):
        block = 16 * draw.randint(1, 4)
        lengths = (1 + i, *(draw.choice([0, 5, block, draw.randint(1, 200)]) for _ in range(draw.randint(0, 4))))
        yield Case(
            lengths,
            block,
            16 * draw.randint(1, block // 16),
            draw.randint(1, 9),
            16 * draw.randint(1, 5),
            draw.choice([torch.float16, torch.bfloat16]),
            i,
        )


CASES = list(drawn_cases(100))  # more than the tables that are kept


def results(i):
    """y, dx and dw of a case, by the public function or the op, of its prefix sums in one of their forms."""
    case = CASES[i]
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in case.inputs[:2])
    form = FORMS[i % len(FORMS)]
    function = nsa.nsa_compress if i % 3 else torch.ops.nsa.nsa_compress
    ends = form(case.actual_seq_len)
    y = function(x, weight, *case.geometry, actual_seq_len=ends if i % 3 else list(case.actual_seq_len))
    y.backward(case.inputs[2])
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("tables", [64, 1])
def test_threads_have_the_bits_of_one(tables, monkeypatch):
    """Each thread goes through all cases, from another one on: first all threads want one table, then others."""
    alone = [results(i) for i in range(len(CASES))]
    kept = table.lru_cache(maxsize=tables)(table._kept_table.__wrapped__)
    monkeypatch.setattr(table, "_kept_table", kept)
    start = Barrier(THREADS)

    def work(thread):
        start.wait()
        order = [0, *(1 + (i + 12 * thread) % (len(CASES) - 1) for i in range(len(CASES) - 1))]
        return [(i, results(i)) for i in order]

    with ThreadPoolExecutor(THREADS) as pool:
        for computed in pool.map(work, range(THREADS)):
            for i, one in computed:
                assert all(map(torch.equal, one, alone[i]))
    assert kept.cache_info().currsize == tables


def test_a_thread_runs_backward_of_what_another_ran_forward():
    alone = results(5)
    case = CASES[5]
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in case.inputs[:2])
    with ThreadPoolExecutor(THREADS) as pool:
        call = [x, weight, *case.geometry]
        ys = list(pool.map(lambda _: nsa.nsa_compress(*call, actual_seq_len=case.actual_seq_len), range(THREADS)))
        grads = list(pool.map(lambda y: torch.autograd.grad(y, (x, weight), case.inputs[2]), ys))
    for y, (dx, dw) in zip(ys, grads):
        assert all(map(torch.equal, (y, dx, dw), alone))
