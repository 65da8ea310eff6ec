"""What the ops for decode and prefill refuse: the exception, what it says, and that nothing was written before."""

import re

import numpy as np
import pytest
import torch

import nsa

INFER = {"nsa.infer": nsa.nsa_compress_infer, "ops.infer": torch.ops.nsa.nsa_compress_infer}
APPEND = {"nsa.append": nsa.nsa_compress_append, "ops.append": torch.ops.nsa.nsa_compress_append}
BOTH = INFER | APPEND


def good(function):
    """Arguments of a call that writes two rows. function: a name in BOTH."""
    common = {
        "input": torch.ones(5, 32, 2, 16),
        "weight": torch.ones(32, 2),
        "compress_block_size": 32,
        "compress_stride": 16,
        "page_block_size": 32,
        "block_table": torch.tensor([[4, 1], [2, 3]], dtype=torch.int32),
    }
    if function in INFER:
        slots = torch.tensor([2, 0], dtype=torch.int32)
        return common | {"slot_mapping": slots, "actual_seq_len": [48, 32], "cache": torch.zeros(3, 2, 16)}
    lengths = {"seq_len_before": torch.tensor([40, 0]), "seq_len_after": torch.tensor([48, 47])}
    return common | lengths | {"cache_table": torch.tensor([[1], [0]]), "cache": torch.zeros(3, 2, 2, 16)}


# (which functions, arguments that are other than in a good call, exception, what it says)
WRONG = [
    (BOTH, {"input": torch.ones(5, 32, 2, 16).half()}, TypeError, "input and weight must have the same dtype"),
    (BOTH, {"cache": "half"}, TypeError,
     "input and cache must have the same dtype, got torch.float32 and torch.float16"),
    (BOTH, {"input": torch.ones(5, 32, 2, 16, dtype=torch.int32),
      "weight": torch.ones(32, 2, dtype=torch.int32)}, TypeError,
     "must be one of torch.float16"),
    (BOTH, {"input": torch.ones(160, 2, 16)}, RuntimeError,
     "input must have rank 4, (pages, page_block_size, N, D), got rank 3"),
    (BOTH, {"weight": torch.ones(64)}, RuntimeError, "weight must have rank 2, (compress_block_size, N), got rank 1"),
    (BOTH, {"weight": torch.ones(32, 3)}, RuntimeError,
     "weight must have shape (compress_block_size, N) = (32, 2), got (32, 3)"),
    (BOTH, {"compress_block_size": 48}, RuntimeError,
     "weight must have shape (compress_block_size, N) = (48, 2), got (32, 2)"),
    (BOTH, {"compress_stride": 8}, RuntimeError, "compress_stride must be a multiple of 16, got 8"),
    (BOTH, {"compress_stride": 48}, RuntimeError, "compress_stride must be in [16, compress_block_size = 32], got 48"),
    (BOTH, {"compress_stride": 0}, RuntimeError, "compress_stride must be in [16, compress_block_size = 32], got 0"),
    (BOTH, {"page_block_size": 16}, RuntimeError, "input.shape[1] must equal page_block_size = 16, got 32"),
    (BOTH, {"page_block_size": 24}, RuntimeError, "page_block_size must be a positive multiple of 16, got 24"),
    (BOTH, {"page_block_size": 0}, RuntimeError, "page_block_size must be a positive multiple of 16, got 0"),
    (BOTH, {"page_block_size": -32}, RuntimeError, "page_block_size must be a positive multiple of 16, got -32"),
    (BOTH, {"input": torch.ones(0, 32, 2, 16)}, RuntimeError, "input must have at least one page, got none"),
    (BOTH, {"input": torch.ones(5, 32, 2, 24)}, RuntimeError, "D must be a positive multiple of 16, got 24"),
    (BOTH, {"input": torch.ones(5, 32, 2, 32)[..., ::2]}, RuntimeError,
     "the elements of a head of input must lie one behind the other, got a distance of 2"),
    (BOTH, {"cache": "every second element"}, RuntimeError,
     "the elements of a head of cache must lie one behind the other, got a distance of 2"),
    (BOTH, {"cache": "expanded"}, RuntimeError,
     "cache must have memory of its own for each row and head, got an expanded tensor"),
    (BOTH, {"cache": "more heads"}, RuntimeError, "with N = 2, D = 16, got ("),
    (BOTH, {"cache": "no rows"}, RuntimeError, "cache must have at least one row, got shape (0"),
    (BOTH, {"cache": "meta"}, RuntimeError, "input and cache must be on the same device, got cpu and meta"),
    (BOTH, {"weight": torch.ones(32, 2, device="meta")}, RuntimeError,
     "input and weight must be on the same device, got cpu and meta"),
    (BOTH, {"input": torch.ones(5, 32, 2, 16).to_sparse()}, RuntimeError, "input must have layout torch.strided"),
    (BOTH, {"block_table": torch.ones(2, 2)}, TypeError,
     "block_table must be of torch.int32 or torch.int64, got torch.float32"),
    (BOTH, {"block_table": torch.ones(2).int()}, RuntimeError,
     "block_table must have rank 2, (batch, pages of a sequence), got rank 1"),
    (BOTH, {"block_table": torch.ones(2, 0).int()}, RuntimeError,
     "block_table must have at least one column, got shape (2, 0)"),
    (BOTH, {"block_table": torch.ones(2, 2, device="meta").int()}, RuntimeError,
     "block_table must be on the device of input, cpu, got meta"),
    (BOTH, {"block_table": torch.tensor([[4, 5], [2, 3]])}, RuntimeError,
     "block_table must hold pages in [0, 5), got 5 at index (0, 1)"),
    (BOTH, {"block_table": torch.tensor([[4, 1], [-1, 3]])}, RuntimeError,
     "block_table must hold pages in [0, 5), got -1 at index (1, 0)"),
    (INFER, {"block_table": torch.ones(3, 2).int()}, RuntimeError,
     "block_table must have 2 rows, one a sequence, got shape (3, 2)"),
    (INFER, {"block_table": None}, RuntimeError,
     "block_table may be left out where each of the 2 sequences has equally many pages, one behind the other, "
     "got 5 pages"),
    (INFER, {"block_table": torch.tensor([[4], [2]])}, RuntimeError,
     "actual_seq_len must be at most 32, as many rows as block_table has pages for, got 48 at index 0"),
    (INFER, {"actual_seq_len": [48, -1]}, RuntimeError, "actual_seq_len must not be negative, got -1 at index 1"),
    (INFER, {"actual_seq_len": None}, TypeError, "actual_seq_len must be a tuple or list of ints"),
    (INFER, {"actual_seq_len": [48]}, RuntimeError, "slot_mapping must have 1 rows, one a sequence, got shape (2,)"),
    (INFER, {"slot_mapping": torch.tensor([2.0, 0.0])}, TypeError,
     "slot_mapping must be of torch.int32 or torch.int64, got torch.float32"),
    (INFER, {"slot_mapping": torch.tensor([[2], [0]])}, RuntimeError,
     "slot_mapping must have rank 1, (batch,), got rank 2"),
    (INFER, {"slot_mapping": torch.tensor([2, 3])}, RuntimeError,
     "slot_mapping must be in [0, 3), the rows of cache, or -1 where no window is due, got 3 at index 1"),
    (INFER, {"slot_mapping": torch.tensor([2, -2])}, RuntimeError, "got -2 at index 1"),
    (INFER, {"slot_mapping": torch.tensor([2, -1])}, RuntimeError,
     "slot_mapping must have a row of cache where a window is due, got -1 at index 1"),
    (INFER, {"slot_mapping": torch.tensor([2, 2])}, RuntimeError,
     "slot_mapping must not name a row of cache twice: got 2 twice"),
    (INFER, {"slot_mapping": torch.tensor([2, 2]), "actual_seq_len": [48, 33]}, RuntimeError,
     "slot_mapping must not name a row of cache twice: got 2 twice"),
    (INFER, {"cache": torch.zeros(3, 2, 2, 16)}, RuntimeError, "cache must have rank 3, (slots, N, D), got rank 4"),
    (INFER, {"actual_seq_len": torch.tensor([48, 32], device="meta")}, RuntimeError,
     "actual_seq_len must be on the CPU, got a tensor on meta: nsa_compress_append takes lengths on the device"),
    (INFER, {"actual_seq_len": torch.tensor([[48, 32]])}, RuntimeError, "actual_seq_len must have rank 1, got rank 2"),
    (APPEND, {"cache": torch.zeros(3, 2, 16)}, RuntimeError,
     "cache must have rank 4, (pages, rows of a page, N, D), got rank 3"),
    (APPEND, {"block_table": torch.ones(3, 2).int()}, RuntimeError,
     "cache_table must have 3 rows, one a sequence, got shape (2, 1)"),
    (APPEND, {"cache_table": torch.tensor([[1], [3]])}, RuntimeError,
     "cache_table must hold pages in [0, 3), got 3 at index (1, 0)"),
    (APPEND, {"cache_table": torch.tensor([[1], [-5]])}, RuntimeError,
     "cache_table must hold pages in [0, 3), got -5 at index (1, 0)"),
    (APPEND, {"cache_table": torch.tensor([[1], [1]]), "seq_len_before": torch.tensor([0, 0])}, RuntimeError,
     "cache_table must not name a row of cache twice: two windows go to row 2 of cache"),
    (APPEND, {"seq_len_after": torch.tensor([64, 47])}, RuntimeError,
     "cache_table must have a page for every window that is written: sequence 0 needs 2 columns, got 1"),
    (APPEND, {"seq_len_after": torch.tensor([65, 47])}, RuntimeError,
     "seq_len_after must be at most 64, as many rows as block_table has pages for, got 65 at index 0"),
    (APPEND, {"seq_len_before": torch.tensor([40, -3])}, RuntimeError,
     "seq_len_before must not be negative, got -3 at index 1"),
    (APPEND, {"seq_len_before": torch.tensor([49, 0])}, RuntimeError,
     "seq_len_after must not be less than seq_len_before, got 48 after 49 at index 0"),
    (APPEND, {"seq_len_after": torch.tensor([48.0, 47.0])}, TypeError,
     "seq_len_after must be of torch.int32 or torch.int64, got torch.float32"),
    (APPEND, {"seq_len_after": torch.tensor([48])}, RuntimeError,
     "seq_len_after must have 2 rows, one a sequence, got shape (1,)"),
    (APPEND, {"seq_len_before": torch.tensor([40, 0], device="meta")}, RuntimeError,
     "seq_len_before must be on the device of input, cpu, got meta"),
    (APPEND, {"max_new_rows": -1}, RuntimeError, "max_new_rows must not be negative, got -1"),
]  # fmt: skip
CACHES = {
    "half": lambda cache: cache.half(),
    "every second element": lambda cache: cache.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda cache: cache[:1].expand(cache.shape),
    "more heads": lambda cache: cache.repeat_interleave(2, -2),
    "no rows": lambda cache: cache[:0],
    "meta": lambda cache: cache.to("meta"),
}


@pytest.mark.parametrize(
    ("function", "wrong", "error", "message"),
    [(name, *wrong) for functions, *wrong in WRONG for name in functions],
)
def test_refused_before_anything_is_written(function, wrong, error, message):
    arguments = good(function) | wrong
    if isinstance(arguments["cache"], str):
        arguments["cache"] = CACHES[arguments["cache"]](good(function)["cache"])
    before = arguments["cache"].clone()
    with pytest.raises(error, match=re.escape(message)):
        BOTH[function](**arguments)
    if before.device.type == "cpu":
        assert torch.equal(arguments["cache"], before)


@pytest.mark.parametrize("function", BOTH)
def test_good_calls_write(function):
    arguments = good(function)
    assert BOTH[function](**arguments) is arguments["cache"]
    assert (arguments["cache"] == 32).any()


@pytest.mark.parametrize("function", ["nsa.infer", "nsa.append"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"input": None}, TypeError, "input must be a torch.Tensor, got NoneType"),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"cache": None}, TypeError, "cache must be a torch.Tensor, got NoneType"),
        ({"compress_block_size": 32.0}, TypeError, "compress_block_size must be an int, got float"),
        ({"compress_stride": True}, TypeError, "compress_stride must be an int, got bool"),
        ({"page_block_size": "32"}, TypeError, "page_block_size must be an int, got str"),
        ({"page_block_size": 2**64}, RuntimeError, f"page_block_size must fit in 64 bits, got {2**64}"),
    ],
)
def test_wrong_python_types(function, wrong, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BOTH[function](**(good(function) | wrong))


@pytest.mark.parametrize("lengths", [[48.0, 32], "48", [True, 32], torch.tensor([48.0, 32.0]), 48, [None, 32]])
def test_lengths_that_are_no_ints(lengths):
    with pytest.raises(TypeError, match="actual_seq_len must be"):
        nsa.nsa_compress_infer(**(good("nsa.infer") | {"actual_seq_len": lengths}))


@pytest.mark.parametrize("function", BOTH)
def test_nested_pages(function):
    nested = torch.nested.nested_tensor([torch.ones(3, 16), torch.ones(5, 16)], layout=torch.jagged)
    with pytest.raises(
        RuntimeError, match=r"input must be a plain tensor, got a nested tensor of layout torch.jagged$"
    ):
        BOTH[function](**(good(function) | {"input": nested}))


def test_numpy_ints_are_ints():
    arguments = good("nsa.infer")
    sizes = {name: np.int64(value) for name, value in arguments.items() if isinstance(value, int)}
    nsa.nsa_compress_infer(**(arguments | sizes))
    assert arguments["cache"].any()


@pytest.mark.parametrize(
    ("function", "name"),
    [(f, name) for f in ("nsa.infer", "nsa.append") for name, value in good(f).items() if torch.is_tensor(value)],
)
def test_memory_that_was_given_back(function, name):
    arguments = good(function)
    arguments[name].untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match=f"{name} of shape .* must have .* bytes of memory, got 4"):
        BOTH[function](**arguments)


def test_entries_that_no_due_window_needs_may_be_anything():
    """Padding of tables, and sequences that are none: length 0, no slot."""
    arguments = good("nsa.infer")
    arguments["block_table"] = torch.tensor([[4, 1, -1], [2, 10**9, -7], [-1, -1, -1]])
    arguments["slot_mapping"] = torch.tensor([2, 0, -1])
    arguments["actual_seq_len"] = [48, 32, 0]
    nsa.nsa_compress_infer(**arguments)
    assert arguments["cache"].any(-1).any(-1).tolist() == [True, False, True]
