"""The kernel for decode and prefill, as it is launched on a device, against the reference in fp64. Run as
test_kernels.py is."""

from dataclasses import replace

import pytest
import torch
from growth import Engine, Growth, growths
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import machine
from tolerance import assert_close

from nsa import accelerator
from nsa.kernels import append, tiles

EXAMPLES = min(25 if tiles.ANY_SIZE else 15, settings.default.max_examples)
SMALL = Growth(((40, 0, 31), (100, 31, 31), (112, 32, 48)), 32, 16, 3, 32, 16, 2)


def grow(growth, machine, most_windows=10**6, new=torch.empty, spoil=lambda engine: None):
    """The engine after all steps."""
    engine = Engine(growth, new)
    spoil(engine)
    for lengths in growth.steps:
        before, after = engine.grow(lengths)
        tables = (engine.table, before, after, engine.cache_table)
        sizes = (growth.stride, most_windows)
        accelerator.append(engine.pages, growth.weight, *tables, engine.cache, *sizes, machine=machine)
    return engine


def check(engine):
    rows, others_untouched = engine.rows()
    assert others_untouched
    case = engine.growth.case
    if len(rows):
        assert_close(rows, case.exact[0], case.magnitude[0], case.terms[0])


@settings(max_examples=EXAMPLES)
@given(growth=growths(most=200), programs=st.integers(1, 9), most_windows=st.sampled_from([1, 3, 10**6]))
def test_generated(growth, programs, most_windows, guarded, interpreted):
    check(grow(growth, machine(programs, interpreted), most_windows, guarded.empty))
    guarded.check()


@pytest.mark.every_target
@pytest.mark.parametrize(
    "sizes", [(128, 32, 1, 256), (48, 48, 7, 16), (80, 16, 2, 144), (16, 16, 128, 16), (64, 32, 3, 192)], ids=str
)
def test_ends_of_the_sizes(sizes, guarded, interpreted):
    block, stride = sizes[:2]
    growth = Growth(((block + 20, 5), (2 * block + stride, block)), *sizes, 32, 3)
    check(grow(growth, machine(4, interpreted), new=guarded.empty))
    guarded.check()


@pytest.mark.every_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_same_bits_however_it_grew(dtype, interpreted):
    """In other chunks, on other pages, by other programs, the sums are the same and in the same order."""
    growth = replace(SMALL, dtype=dtype)
    expected = grow(growth, machine(5, interpreted)).rows()[0]
    others = [
        (replace(growth, steps=growth.steps[-1:], page=48, cache_page=16), 40, 10**6),
        (replace(growth, steps=((112, 0, 0), (112, 32, 0), *growth.steps[-1:]), index=torch.int64), 1, 1),
        (replace(growth, steps=((0, 31, 0), (64, 31, 16), *growth.steps[-1:]), page=128, cache_page=1), 7, 3),
    ]
    for other, programs, most_windows in others:
        assert torch.equal(grow(other, machine(programs, interpreted), most_windows).rows()[0], expected)


@pytest.mark.every_target
def test_newest_window(interpreted):
    """slots (batch,): a page of the cache for each sequence, to which the window goes that the last row filled."""
    growth = replace(SMALL, cache_page=1)
    all_windows = grow(growth, machine(4, interpreted))
    engine = Engine(growth)
    after = growth.steps[-1]  # the first and the last sequence have just filled a window, and so has the second
    engine.grow(after)
    before = torch.tensor(after) - 1
    slots = torch.tensor([4, 2, 0])
    accelerator.append(
        engine.pages, growth.weight, engine.table, before, torch.tensor(after), slots, engine.cache, growth.stride,
        most_windows=1, machine=machine(4, interpreted),
    )  # fmt: skip
    for b, window in enumerate((5, 0, 1)):
        assert torch.equal(engine.cache[slots[b], 0], all_windows.cache[all_windows.slot(b, window)])
    engine.cache[slots] = torch.nan
    assert engine.cache.isnan().all()


@pytest.mark.every_target
@pytest.mark.parametrize("where", ["table", "cache_table"])
@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, "one too many"])
def test_what_is_no_page_is_neither_read_nor_written(where, value, guarded, interpreted):
    """Sequence 0 has windows 0 to 5. Its page 3, rows 48 to 63, is in windows 2 and 3; its page 1 of the cache holds
    the same two."""
    column = 3 if where == "table" else 1

    def spoil(engine):
        pages = engine.pages if where == "table" else engine.cache
        getattr(engine, where)[0, column] = len(pages) if value == "one too many" else value

    good = grow(SMALL, machine(5, interpreted))
    engine = Engine(SMALL, guarded.empty)
    before, after = engine.grow(SMALL.steps[-1])
    engine.pages[engine.pages.isnan()] = 1  # what is written in error is no NaN
    spoil(engine)
    accelerator.append(
        engine.pages, SMALL.weight, engine.table, before, after, engine.cache_table, engine.cache, SMALL.stride,
        most_windows=10, machine=machine(5, interpreted),
    )  # fmt: skip
    guarded.check()
    for b, count in enumerate((6, 1, 2)):
        for window in range(count):
            spoilt = b == 0 and window in (2, 3)
            if spoilt and where == "cache_table":
                continue  # it has no place
            row = engine.cache[engine.slot(b, window)]
            assert row.isnan().all() if spoilt else torch.equal(row, good.cache[good.slot(b, window)])


@pytest.mark.every_target
@pytest.mark.parametrize("which", ["table", "cache_table"])
@pytest.mark.parametrize("b", [0, 2])
def test_tables_too_narrow_for_a_length(which, b, guarded, interpreted):
    """Windows past them are not written. Of the first sequence, no entry of the next is taken for one; of the last,
    nothing is read past the table."""
    growth = SMALL if b == 0 else replace(SMALL, steps=tuple(step[::-1] for step in SMALL.steps))
    good = grow(growth, machine(3, interpreted))
    engine = Engine(growth, guarded.empty)
    before, after = engine.grow(growth.steps[-1])
    narrow = {"table": engine.table, "cache_table": engine.cache_table}
    narrow[which] = narrow[which][:, :2].contiguous()  # rows 0 to 31: window 0; windows 0 to 3
    accelerator.append(
        engine.pages, growth.weight, narrow["table"], before, after, narrow["cache_table"], engine.cache, growth.stride,
        most_windows=10, machine=machine(3, interpreted),
    )  # fmt: skip
    guarded.check()
    n_written = 1 if which == "table" else 4
    for window in range(6):
        row = engine.cache[engine.slot(b, window)]
        assert torch.equal(row, good.cache[good.slot(b, window)]) if window < n_written else row.isnan().all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_lengths_far_past_the_table(index, guarded, interpreted):
    """As if they ended where the table does, and at once."""
    good = grow(SMALL, machine(3, interpreted))
    engine = Engine(SMALL, guarded.empty)
    before, after = engine.grow(SMALL.steps[-1])
    after = after.to(index)
    after[0] = torch.iinfo(index).max - 40
    accelerator.append(
        engine.pages, SMALL.weight, engine.table, before, after, engine.cache_table, engine.cache, SMALL.stride,
        most_windows=10, machine=machine(3, interpreted),
    )  # fmt: skip
    guarded.check()
    assert torch.equal(engine.rows()[0], good.rows()[0])


def test_lengths_below_zero_count_as_zero(guarded, interpreted):
    good = grow(SMALL, machine(3, interpreted))
    engine = Engine(SMALL, guarded.empty)
    before, after = engine.grow(SMALL.steps[-1])
    before[0], before[2] = -1, -(2**31)
    accelerator.append(
        engine.pages, SMALL.weight, engine.table, before, after, engine.cache_table, engine.cache, SMALL.stride,
        most_windows=10, machine=machine(3, interpreted),
    )  # fmt: skip
    assert torch.equal(engine.rows()[0], good.rows()[0])


def test_lengths_that_shrink_write_nothing(interpreted):
    engine = Engine(SMALL)
    before, after = engine.grow(SMALL.steps[-1])
    accelerator.append(
        engine.pages, SMALL.weight, engine.table, after, before, engine.cache_table, engine.cache, SMALL.stride,
        most_windows=10, machine=machine(3, interpreted),
    )  # fmt: skip
    assert engine.cache.isnan().all()


@pytest.mark.every_target
def test_strides_of_pages_and_cache(interpreted):
    """Keys and values in one row of a page; in the cache heads before rows."""
    engine, dense = Engine(SMALL), grow(SMALL, machine(3, interpreted))
    before, after = engine.grow(SMALL.steps[-1])
    pages = torch.cat([torch.full_like(engine.pages, torch.nan), engine.pages], -1)[..., SMALL.d :]
    cache = engine.cache.transpose(1, 2).contiguous().transpose(1, 2)
    assert not pages.is_contiguous()
    assert not cache.is_contiguous()
    accelerator.append(
        pages, SMALL.weight, engine.table, before, after, engine.cache_table, cache, SMALL.stride,
        most_windows=10, machine=machine(3, interpreted),
    )  # fmt: skip
    engine.cache = cache
    assert torch.equal(engine.rows()[0], dense.rows()[0])


@pytest.mark.long
def test_offsets_past_2_31():
    """Pages and slots at the end of tensors of more than 2^31 elements, of which the rest stays untouched memory."""
    growth = Growth(((48,),), 48, 16, 8, 256, 16, 1, torch.float16)
    n_far = 2**31 // (16 * growth.n * growth.d) + 10
    far = torch.empty((n_far, 16, growth.n, growth.d), dtype=growth.dtype)
    engine = Engine(growth)
    before, after = engine.grow((48,))
    far[-3:] = engine.pages[engine.table[0].long()]
    table = torch.arange(n_far - 3, n_far)[None].int()
    cache = far.view(-1, 1, growth.n, growth.d)
    slots = torch.tensor([[len(cache) - 60]])
    append.append(far, growth.weight, table, before, after, slots, cache, growth.stride, 1, 1)
    case = growth.case
    assert_close(cache[-60], case.exact[0], case.magnitude[0], case.terms[0])


@pytest.mark.long
def test_rows_of_a_page_past_2_31(interpreted):
    """A cache that is no paged one, (rows, sequences, N, D): a page for each sequence, whose rows lie far apart. The
    compressed ones lie likewise."""
    growth = Growth(((48,),), 48, 16, 8, 128, 16, 1, torch.float16)
    engine = Engine(growth)
    engine.grow((48,))
    n_rows, sequences = 2**15 + 48, 64
    far = torch.empty((n_rows, sequences, growth.n, growth.d), dtype=growth.dtype)
    far[-48:, -1] = growth.x[0]
    after = torch.tensor([n_rows])
    window = (n_rows - 48) // 16
    cache = far[::16].transpose(0, 1)
    assert far.numel() - far.stride(0) > 2**31
    append.append(
        far.transpose(0, 1), growth.weight, torch.tensor([[sequences - 1]]), after - 1, after,
        torch.tensor([[sequences - 2]]), cache, growth.stride, 1, 1,
    )  # fmt: skip
    case = growth.case
    assert_close(cache[-2, window][None], case.exact[0], case.magnitude[0], case.terms[0])


@pytest.mark.parametrize(
    ("shape", "strides", "width", "message"),
    [
        (
            (2, 16, 4, 16),
            (2**28, 2**28, 16, 1),
            1,
            "16 rows of input must lie within 2147483647 elements on meta, got 40",
        ),
        ((2, 16, 4, 16), (16, 16, 2**30, 1), 1, "16 rows of input must lie within"),
        ((2, 2**20, 4, 16), (2**26, 64, 16, 1), 2**11, "block_table must have pages for at most 2147483647 rows"),
    ],
)
def test_what_32_bits_do_not_hold_is_an_error(shape, strides, width, message):
    x = torch.empty_strided(shape, strides, device="meta", dtype=torch.float16)
    table, cache = torch.zeros((1, width), device="meta"), torch.empty((2, 1, 4, 16), device="meta")
    with pytest.raises(RuntimeError, match=message):
        append.check_reach(x, table, cache)
    append.check_reach(cache, table[:, :1], cache)
    far = torch.empty_strided((2, 1, 4, 16), (2**33, 2**33, 2**30, 1), device="meta")
    with pytest.raises(
        RuntimeError, match="a row of cache must lie within 2147483647 elements on meta, got 3221225488"
    ):
        append.check_reach(cache, table[:, :1], far)


def test_shares():
    """(lanes, lanes for a sequence, programs) of a batch, windows, columns and programs."""
    assert append.shares(64, 1, 2, 40) == (20, 1, 40)
    assert append.shares(3, 512, 2, 40) == (20, 20, 40)
    assert append.shares(3, 1, 2, 40) == (3, 1, 6)  # no lane without a sequence, no program without a column
    assert append.shares(256, 4, 2, 40) == (20, 4, 40)
    assert append.shares(256, 1, 64, 40) == (1, 1, 40)  # more columns than programs
    assert append.shares(1, 1, 1, 40) == (1, 1, 1)
    for batch in (1, 7, 300):
        for most_windows in (1, 3, 1000):
            for columns in (1, 3, 64):
                for n_programs in (1, 5, 48):
                    lanes, splits, programs = append.shares(batch, most_windows, columns, n_programs)
                    assert lanes % splits == programs % lanes == 0
                    assert 1 <= splits <= lanes <= programs <= n_programs
