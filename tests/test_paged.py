"""The ops for decode and prefill on the CPU: a sequence that grows in pages has the bits of one forward."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from growth import Engine, Growth, growths, spread
from hypothesis import given, settings
from tolerance import assert_close

import nsa
from nsa import cpu
from nsa.cpu import native, operators

BACKENDS = {"native": native, "operators": operators}


@pytest.fixture(params=BACKENDS)
def backend(request):
    """What the CPU runs on; yields its module."""
    module = BACKENDS[request.param]
    with mock.patch.object(cpu, "_backend", return_value=module):
        yield module


def append(engine, before, after, **more):
    growth = engine.growth
    result = nsa.nsa_compress_append(
        engine.pages, growth.weight, engine.cache_table, *growth.geometry, growth.page, block_table=engine.table,
        seq_len_before=before, seq_len_after=after, cache=engine.cache, **more,
    )  # fmt: skip
    assert result is engine.cache


def infer(engine, lengths, slots):
    growth = engine.growth
    cache = engine.cache.flatten(0, 1)
    result = nsa.nsa_compress_infer(
        engine.pages, growth.weight, torch.tensor(slots, dtype=growth.index), *growth.geometry, growth.page,
        block_table=engine.table, actual_seq_len=lengths, cache=cache,
    )  # fmt: skip
    assert result is cache


def forward(growth):
    x, weight, _ = growth.case.inputs
    if not len(x):
        return x
    ends = np.cumsum(growth.case.lengths)
    ends = ends[np.argmax(ends > 0) :]  # empty sequences at the beginning have no window and no legal prefix sum
    return torch.ops.nsa.nsa_compress(x, weight, *growth.geometry, actual_seq_len=ends.tolist())


def check(engine):
    rows, others_untouched = engine.rows()
    assert torch.equal(rows.flatten(), forward(engine.growth).flatten())
    assert others_untouched


@settings(max_examples=100)
@given(growth=growths())
def test_chunks_have_the_bits_of_one_forward(growth, backend):
    engine = Engine(growth)
    for lengths in growth.steps:
        append(engine, *engine.grow(lengths))
    check(engine)


@settings(max_examples=10)
@given(growth=growths(most=120))
def test_token_by_token_has_the_bits_of_one_forward(growth, backend):
    """All sequences start together; those that are complete stay as they are, and their window is written again."""
    engine = Engine(growth)
    for length in range(1, max(growth.steps[-1], default=0) + 1):
        lengths = [min(length, last) for last in growth.steps[-1]]
        engine.grow(lengths)
        infer(engine, lengths, engine.slot_mapping())
    check(engine)


def test_against_fp64(backend):
    growth = Growth(((100, 31, 64),), 32, 16, 3, 48, 16, 4, torch.float16)
    engine = Engine(growth)
    append(engine, *engine.grow(growth.steps[-1]))
    assert_close(engine.rows()[0], growth.case.exact[0], growth.case.magnitude[0], growth.case.terms[0])


@pytest.mark.parametrize("rows", [3000, 700])  # more windows than threads take at once, and few to share out
def test_any_number_of_threads(backend, rows):
    growth = Growth(((rows,),), 32, 16, 8, 128, 64, 16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            engine = Engine(growth)
            append(engine, *engine.grow(growth.steps[-1]))
            check(engine)
    finally:
        torch.set_num_threads(before)


def test_rows_taken_back_are_written_again(backend):
    """Speculation: 5 rows come, fill a window, and 4 of them are rejected; other rows take their place."""
    growth = Growth(((46,), (60,)), 32, 16, 2, 16, 16, 1)
    engine = Engine(growth)
    append(engine, *engine.grow((46,)))
    rejected = [torch.full_like(growth.x[0], 7)]
    append(engine, *engine.grow((51,), rejected))
    assert not torch.equal(engine.rows()[0], forward(growth)[:2])  # window 1, rows 16 to 47, has two of them
    engine.lengths = [46 + 1]
    engine.pages[engine.table[0, 2], 14] = growth.x[0][46]  # the row that was accepted
    append(engine, *engine.grow((60,)))
    check(engine)


def test_a_chunk_with_no_end_of_a_window_writes_nothing(backend):
    growth = Growth(((33,), (47,)), 32, 16, 2, 16, 16, 1)
    engine = Engine(growth)
    append(engine, *engine.grow((33,)))
    cache = engine.cache.clone()
    append(engine, *engine.grow((47,)))
    assert torch.equal(engine.cache.view(torch.int16), cache.view(torch.int16))


# what makes pages of these sizes, for keys or values and for the cache
LAYOUTS = {
    "keys beside values, page by page": lambda new, pages, page, n, d: new(pages, 2, page, n, d)[:, 1],
    "keys and values in one row": lambda new, pages, page, n, d: new(pages, page, n, 2 * d)[..., d:],
    "heads before rows": lambda new, pages, page, n, d: new(pages, n, page, d).transpose(1, 2),
    "every second row": lambda new, pages, page, n, d: new(pages, 2 * page, n, d)[:, ::2],
    "a row of each page in turn": lambda new, pages, page, n, d: new(page, pages, n, d).transpose(0, 1),
    "every third head": lambda new, pages, page, n, d: new(pages, page, 3 * n, d)[:, :, 1::3],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_engines_have(name, backend):
    growth = Growth(((100, 64), (130, 70)), 32, 16, 2, 32, 32, 4)
    dense = Engine(growth)
    engine = Engine(growth, new=lambda shape, dtype: LAYOUTS[name](partial(torch.empty, dtype=dtype), *shape))
    assert engine.pages.stride() != dense.pages.stride()
    for lengths in growth.steps:
        append(engine, *engine.grow(lengths))
    check(engine)


def test_weight_and_tables_of_any_strides(backend):
    growth = Growth(((100, 64), (130, 70)), 32, 16, 2, 32, 32, 4)
    engine = Engine(growth)
    x, weight, dy = growth.case.inputs
    growth.__dict__["case"] = growth.case.with_inputs(x, weight.t().contiguous().t(), dy)
    assert not growth.weight.is_contiguous()
    for name in ("table", "cache_table"):
        setattr(engine, name, spread(getattr(engine, name)))
    for lengths in growth.steps:
        append(engine, *map(spread, engine.grow(lengths)))
    rows, others_untouched = engine.rows()
    expected = torch.ops.nsa.nsa_compress(x, weight, *growth.geometry, actual_seq_len=[130, 200])
    assert torch.equal(rows, expected)
    assert others_untouched


def test_without_a_block_table():
    """A cache with a fixed part for each sequence, as the static ones of many libraries: a page is a part of it."""
    growth = Growth(((48, 33, 32),), 32, 16, 2, 16, 64, 1)
    parts = torch.randn(3, 64, 2, 16)
    weight = torch.randn(32, 2)
    cache = torch.zeros(4, 2, 16)
    slots = torch.tensor([3, -1, 0])
    for pages, page in ((parts, 64), (parts.view(12, 16, 2, 16), 16)):
        nsa.nsa_compress_infer(pages, weight, slots, *growth.geometry, page, actual_seq_len=(48, 33, 32), cache=cache)
        for slot, rows in ((3, parts[0, 16:48]), (0, parts[2, :32])):
            y = torch.ops.nsa.nsa_compress(rows, weight, *growth.geometry, actual_seq_len=[32])
            assert torch.equal(cache[slot], y[0])
        assert not cache[1:3].any()


@pytest.mark.parametrize(
    "lengths", [[48], (48,), np.array([48]), torch.tensor([48], dtype=torch.int32), [np.int64(48)]]
)
def test_lengths_in_every_form(lengths):
    growth = Growth(((48,),), 32, 16, 2, 16, 16, 1)
    engine = Engine(growth)
    engine.grow((48,))
    infer(engine, lengths, engine.slot_mapping())
    assert torch.equal(engine.cache[engine.slot(0, 1)], forward(growth)[1])


def test_no_sequences():
    x, weight = torch.randn(2, 16, 2, 16), torch.randn(32, 2)
    none = torch.zeros(0, dtype=torch.int32)
    cache = torch.zeros(1, 2, 16)
    nsa.nsa_compress_infer(x, weight, none, 32, 16, 16, block_table=none.view(0, 1), actual_seq_len=[], cache=cache)
    nsa.nsa_compress_append(
        x, weight, none.view(0, 1), 32, 16, 16, block_table=none.view(0, 1), seq_len_before=none, seq_len_after=none,
        cache=cache[None],
    )  # fmt: skip
    assert not cache.any()


@pytest.mark.parametrize("most", [0, 1, 17, 10**6, np.int64(3)])
def test_max_new_rows_changes_nothing(most):
    growth = Growth(((100, 20),), 32, 16, 2, 16, 16, 2)
    engine = Engine(growth)
    append(engine, *engine.grow((100, 20)), max_new_rows=most)
    check(engine)
