"""The table of chips against the compiler that it was made with, and chips that it lacks."""

import subprocess
import sys
from pathlib import Path

import pytest

from nsa.ascend import chips, find_target, targets
from nsa.ascend import compile as pipeline
from nsa.ascend.launches import Shape, launches_of
from nsa.ascend.targets import MODELLED, TARGETS


def test_table_is_what_the_compiler_prints():
    assert Path(targets.__file__).with_name("chips.csv").read_text() == chips.table()


def test_every_name_of_the_compiler_is_a_target():
    assert chips.names() == list(TARGETS)
    assert len(TARGETS) == 59


def test_generation_picks_the_tools_that_know_the_chip():
    """A2's tools have no sizes of A5 chips; a chip in the wrong generation would be described otherwise, or not."""
    for target in TARGETS.values():
        sizes = chips.described(target.name, target.tools)
        assert sizes == {field: getattr(target, field) for field in sizes}


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("Ascend910B2C", "A2"),
        ("Ascend910B4-1", "A2"),
        ("Ascend910_9372", "A3"),
        ("Ascend910_9589", "A5"),  # an older name of an A5 chip
        ("Ascend950DT_95A2", "A5"),
    ],
)
def test_a_kernel_compiles_for_a_chip_of_every_line(name, generation):
    target = find_target(name)
    assert target.generation == generation
    launch = launches_of(Shape(32, 16, 8, 128, "bf16"), target)[3]
    assert launch.name == ("forward_cube_kernel" if generation == "A5" else "forward_fused_kernel")
    facts = pipeline.compile_kernel(launch.kernel, launch.signature, launch.constants, target).facts
    assert facts["multi_buffered"]
    assert facts["memory"]["L1"] <= target.l1


def test_rates_without_a_source_are_marked():
    for target in TARGETS.values():
        if target.assumed_as:
            known = TARGETS[target.assumed_as]
            assert known.generation == target.generation
            assert not known.assumed_as
            assert (target.clock, target.l2, target.ddr_read) == (known.clock, known.l2, known.ddr_read)
            assert target.generation == "A5" or target.cube_cores == known.cube_cores
    assert sum(not target.assumed_as for target in TARGETS.values()) == 6
    assert set(MODELLED) < set(TARGETS)


@pytest.mark.parametrize("name", ["H200", "Ascend910B", ""])
def test_what_is_no_target_is_an_error(name):
    with pytest.raises(ValueError, match=rf"expected a target, one of Ascend910B1, .*, got '{name}'"):
        find_target(name)


def test_targets_need_no_xdsl():
    """An NPU machine has nsa-ascend[npu] alone. What reads HIVM says what is missing."""
    code = """
import sys
sys.modules["xdsl"] = None
import nsa.ascend
print(nsa.ascend.find_target("Ascend910B3").generation)
nsa.ascend.Artefacts("", "", "", "", None, []).facts
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "A2\n"
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: the module xdsl is missing: install nsa-ascend[ascend]"
    )
