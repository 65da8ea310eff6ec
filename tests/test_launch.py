"""The launch plan: sizes of blocks, number of programs."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton

from nsa.kernels import cube, launch, tiles


def test_columns_cut_rows_into_equal_blocks_that_fit():
    for rows in (16, 32, 128):
        for n in range(1, 129):
            for d in range(16, 257, 16):
                sizes = tiles.column_size(n, d, tiles.BLOCK_ELEMENTS // rows)
                bn, bd = sizes["BN"], sizes["BD"]
                assert n % bn == d % bd == bd % 16 == 0
                assert rows * bn * bd <= tiles.BLOCK_ELEMENTS
                assert bn == 1 or bd == d  # several heads are one piece of memory


def test_every_split_has_a_run_and_every_program_an_item():
    """Of 1 part of the result, or of 24, which 20 programs that take turns would share badly."""
    assert cube.splits(1, n_runs=100, n_programs=10) == (10, 10)
    assert cube.splits(1, n_runs=3, n_programs=10) == (3, 3)
    assert cube.splits(24, n_runs=100, n_programs=20) == (4, 20)  # 96 items in 5 rounds of 20
    assert cube.splits(24, n_runs=2, n_programs=20) == (2, 20)
    assert cube.splits(24, n_runs=1, n_programs=40) == (1, 24)


def test_memory_that_starts_at_no_multiple_of_16_bytes_is_copied():
    whole = torch.randn(100).half()
    assert launch.aligned(whole) is whole
    assert launch.aligned(whole[8:]).data_ptr() == whole[8:].data_ptr()
    for part in (whole[1:], whole[7:70].view(7, 9)):
        copy = launch.aligned(part)
        assert copy.data_ptr() % 16 == 0
        assert copy.is_contiguous()
        assert torch.equal(copy, part)


def test_sizes_any_where_triton_takes_any():
    assert tiles.padded(80) == (80 if tiles.ANY_SIZE else 128)
    assert tiles.largest_divisor(50, 16) == (10 if tiles.ANY_SIZE else 2)
    assert tiles.column_size(8, 128, 256) == {"BN": 2, "BD": 128}


@pytest.mark.parametrize(
    ("rows", "itemsize", "ascend", "gpu"),
    [
        (16, 2, (16, {"BN": 4, "BD": 128}), (8, {"BN": 8, "BD": 128, "num_warps": 4})),
        (128, 4, (128, {"BN": 1, "BD": 64}), (16, {"BN": 4, "BD": 128, "num_warps": 4})),
        (48, 8, (48, {"BN": 1, "BD": 128}), (16, {"BN": 2, "BD": 128, "num_warps": 4})),
    ],
)
def test_sums_fill_a_block_on_ascend_and_64_registers_of_a_gpu_thread(rows, itemsize, ascend, gpu):
    assert tiles.sums_block(rows, 8, 128, itemsize) == (ascend if tiles.ANY_SIZE else gpu)


def test_sums_of_short_rows_are_half_as_many_in_the_one_warp_of_a_gpu_program():
    expected = (16, {"BN": 1, "BD": 16}) if tiles.ANY_SIZE else (4, {"BN": 1, "BD": 16, "num_warps": 1})
    assert tiles.sums_block(16, 1, 16, 2) == expected


def test_cores_of_an_npu(monkeypatch):
    utils = SimpleNamespace(get_device_properties=lambda index: {"num_aicore": 20, "num_vectorcore": 40 + index})
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    npu = SimpleNamespace(type="npu", index=1)
    assert launch.program_count(npu, "vector") == 41
    assert launch.program_count(npu, "cube") == 20


@pytest.mark.parametrize(("cores", "programs"), [(132, 132 * 8), (10_000, 65535)])
def test_cores_of_a_gpu(cores, programs):
    with mock.patch.object(
        torch.cuda, "get_device_properties", return_value=SimpleNamespace(multi_processor_count=cores)
    ):
        assert launch.program_count(torch.device("cuda:0"), "cube") == programs


def test_cores_that_cannot_be_read_are_an_error():
    with pytest.raises(RuntimeError, match=r"expected a device of type npu or cuda .*, got cpu"):
        launch.program_count(torch.device("cpu"), "vector")
