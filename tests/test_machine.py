"""What launches depend on, read off a device that a stand-in for Triton's driver describes."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton

from nsa import accelerator
from nsa.ascend import targets
from nsa.ascend.targets import KIB, TARGETS


class Npu(NamedTuple):
    """As much of a torch.device as is looked at: without torch_npu there is no device of this type."""

    index: int
    type: str = "npu"


@pytest.fixture
def npu(monkeypatch):
    """machine_of an NPU with 7 cube and 15 vector cores and a chip of the given name."""

    def machine(chip, cube=7, vector=15):
        properties = {"num_aicore": cube, "num_vectorcore": vector, "max_shared_mem": 1}
        active = SimpleNamespace(
            utils=SimpleNamespace(get_device_properties=lambda index: properties),
            get_current_target=lambda: triton.backends.compiler.GPUTarget("npu", chip, 0),
        )
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
        accelerator.machine_of.cache_clear()
        targets.target_of_device.cache_clear()
        return accelerator.machine_of(Npu(0))

    yield machine
    accelerator.machine_of.cache_clear()
    targets.target_of_device.cache_clear()


def test_cores_of_each_kind_come_from_the_driver(npu):
    machine = npu("Ascend910B3")
    assert (machine.cube_programs, machine.vector_programs) == (7, 15)


IN_USE = ["Ascend910B2C", "Ascend910B4-1", "Ascend910_9372", "Ascend910_9381", "Ascend910_9382"]  # by public reports


@pytest.mark.parametrize("chip", IN_USE)
def test_chips_in_use(npu, chip):
    assert npu(chip).plan == (512 * KIB, 128 * KIB, True, 1)


@pytest.mark.parametrize(
    ("chip", "words", "slices"),
    [
        ("Ascend910B7", "of Ascend910B1, the smallest of A2", True),
        ("Ascend910_9399", "of Ascend910_9362, the smallest of A3", True),
        ("Ascend910B", "of Ascend910B1, the smallest of all generations", False),  # of the first generation
        ("Ascend960PR_9700", "of Ascend910B1, the smallest of all generations", False),
    ],
)
def test_a_chip_that_no_table_has_gets_the_smallest_sizes_of_its_kind(npu, chip, words, slices):
    with pytest.warns(UserWarning, match=f"does not know the chip {chip}: .*{words}") as seen:
        machine = npu(chip)
    assert len(seen) == 1
    assert (machine.cube_programs, machine.vector_programs) == (7, 15)
    least = {memory: min(getattr(target, memory) for target in TARGETS.values()) for memory in ("l1", "l0c")}
    assert machine.plan == (least["l1"], least["l0c"], slices, 1 if slices else 2)
    accelerator.machine_of(Npu(1))  # another device of this kind: a second warning would be an error


def test_smallest_of_a_generation_is_smallest_in_every_memory():
    for generation in ("A2", "A3", "A5", None):
        kind = [target.compile_class[1:] for target in TARGETS.values() if generation in (None, target.generation)]
        assert min(kind) == tuple(map(min, zip(*kind)))


def test_a_device_without_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="expected a device of type npu or cuda"):
        accelerator.machine_of(torch.device("cpu"))


@pytest.mark.parametrize("chip", ["Ascend950PR_9589", "Ascend910_9579"])
def test_an_a5_chip_that_would_get_kernels_for_a2_is_refused(npu, chip, monkeypatch):
    """triton-ascend 3.2.0 always compiles for A2 and A3. Later versions do so where they do not find the card."""
    monkeypatch.setitem(triton.backends.backends, "ascend", backend(compile_on_910_95=False))
    with pytest.raises(RuntimeError, match=f"{chip} is a chip of generation A5, and .* compiles for A2 and A3 here"):
        npu(chip)


def test_an_a5_chip_that_triton_ascend_has_found(npu, monkeypatch):
    monkeypatch.setitem(triton.backends.backends, "ascend", backend(compile_on_910_95=True))
    assert npu("Ascend950DT_9591").plan == (512 * KIB, 256 * KIB, False, 2)


def backend(**defaults):
    """A backend whose compiler has these options."""

    class Compiler:
        def __init__(self, target):
            self.parse_options = lambda given: SimpleNamespace(**defaults)

        @staticmethod
        def supports_target(target):
            return target.backend == "npu"

    return SimpleNamespace(compiler=Compiler)
