"""Every kernel through the real toolchain up to HIVM, for every target, and what is read off the result."""

import random
import subprocess
from concurrent.futures import Future
from unittest import mock

import pytest
import triton
import triton.language as tl

from nsa.ascend import compile as pipeline
from nsa.ascend import hivm
from nsa.ascend.launches import Shape, launches_of
from nsa.ascend.sweep import legal_grid, sweep
from nsa.ascend.targets import MODELLED, TARGETS, find_target, one_of_each_class

USUAL = Shape(32, 16, 8, 128, "bf16")
BOTH = [target for target, _ in one_of_each_class(MODELLED.values())]


def compiled(launch, target):
    return pipeline.compile_kernel(launch.kernel, launch.signature, launch.constants, target)


@pytest.mark.parametrize("name", MODELLED)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_kernel_compiles_for_every_target(name, dtype):
    target = TARGETS[name]
    launches = launches_of(Shape(32, 16, 8, 128, dtype), target)
    assert len(launches) == (3 if dtype == "fp32" else 9)
    for launch in launches:
        facts = compiled(launch, target).facts
        assert facts["core"] in ({"aic", "mix"} if "cube" in launch.name else {"aiv"})
        assert facts["multi_buffered"]
        assert facts["scalar_accesses"] == 0
        assert not facts["switched_off"]
        for memory, used in facts["memory"].items():
            assert 0 < used <= getattr(target, memory.lower())


def test_sample_of_the_grid():
    """All of it is `make sweep`."""
    summary = sweep(random.Random(0).sample(legal_grid(), 12), list(MODELLED.values()), workers=2, progress=False)
    assert summary["cases"] == 12 * 9 * len(BOTH)
    assert summary["failures"] == []
    assert summary["findings"] == []


def test_grid_is_all_of_it():
    grid = legal_grid()
    assert len(grid) == len(set(grid)) == 36 * 16 * 4 * 2


def test_memory_is_what_the_plan_says():
    target = TARGETS["Ascend910B3"]
    for launch in launches_of(USUAL, target):
        artefacts = compiled(launch, target)
        ends = {}
        for record in artefacts.memory:
            memory = hivm.SPACES[record["scope"]]
            ends[memory] = max(max(b["offset"]) + b["extent"] // 8 for b in record["memory_info_array"])
        assert artefacts.facts["memory"] == ends


def test_second_time_comes_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path))
    launch = launches_of(USUAL, BOTH[0])[0]
    first = compiled(launch, BOTH[0])
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("compiled again")):
        assert compiled(launch, BOTH[0]) == first
        with pytest.raises(AssertionError, match="compiled again"):
            compiled(launch, BOTH[1])
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@triton.jit
def square(x, y, K: tl.constexpr):
    o_k = tl.arange(0, K)
    for i in range(10):
        b_x = tl.load(x + i * K + o_k).to(tl.float32)
        tl.store(y + i * K + o_k, b_x * b_x + 1)


@triton.jit
def gather(x, index, y, K: tl.constexpr):
    o_k = tl.arange(0, K)
    tl.store(y + o_k, tl.load(x + tl.load(index + o_k)))


SQUARE = {"x": "*bf16", "y": "*fp32"}


@pytest.mark.parametrize("target", BOTH, ids=lambda target: target.name)
def test_overflow_is_an_error_and_data(target):
    with pytest.raises(pipeline.CompileError, match="ub overflow, requires") as caught:
        pipeline.compile_kernel(square, SQUARE, {"K": 1 << 17}, target)
    overflow = hivm.overflow_of(str(caught.value))
    assert overflow["memory"] == "UB"
    assert overflow["available"] == target.ub < overflow["required"]


def test_switched_off_multi_buffering_is_found():
    facts = pipeline.compile_kernel(square, SQUARE, {"K": 3 << 13}, TARGETS["Ascend910B3"]).facts
    assert "enable-auto-multi-buffer" in facts["switched_off"]
    assert not facts["multi_buffered"]


@pytest.mark.parametrize("target", BOTH, ids=lambda target: target.name)
def test_scalar_fallback_is_found(target):
    signature = {"x": "*bf16", "index": "*i64", "y": "*bf16"}
    facts = pipeline.compile_kernel(gather, signature, {"K": 64}, target).facts
    assert facts["scalar_accesses"] > 0


@triton.jit
def wrong(x):
    tl.store(x, no_such_name)  # noqa: F821


def test_error_carries_the_compilers_message():
    with pytest.raises(pipeline.CompileError, match="no_such_name") as caught:
        pipeline.compile_kernel(wrong, {"x": "*bf16"}, {}, BOTH[0])
    assert caught.value.stage == "ttir"


def test_unknown_target_and_missing_tool():
    with pytest.raises(ValueError, match=r"expected a target, one of Ascend910B1, .*, got 'H200'"):
        find_target("H200")
    with pytest.raises(FileNotFoundError, match="install nsa-ascend"):
        pipeline.tool("no-such-tool")


def test_failures_and_findings_of_a_sweep_are_named():
    message = "ub overflow, requires 1600000 bits while 1572864 bits available"
    slow = {"switched_off": ["enable-auto-multi-buffer"], "scalar_accesses": 3, "multi_buffered": False}

    def broken(function, jobs, workers):
        for job, outcome in zip(jobs, ("fails", "is slow", "is fine")):
            future = Future()
            if outcome == "fails":
                future.set_exception(pipeline.CompileError("hivm", message))
            else:
                future.set_result(function(job) | (slow if outcome == "is slow" else {}))
            yield job, future

    a2_and_a3 = [target for target in MODELLED.values() if target.generation != "A5"]
    with mock.patch.object(pipeline, "map_processes", broken):
        summary = sweep([USUAL], a2_and_a3, workers=1, progress=False)
    (failure,), (finding,) = summary["failures"], summary["findings"]
    assert failure["kernel"] == "forward_vector_kernel"
    assert failure["overflow"] == {"memory": "UB", "required": 200000, "available": 196608}
    assert failure["targets"] == [target.name for target in a2_and_a3]
    assert finding["kernel"] == "grad_input_vector_kernel"
    assert finding["switched_off"] == ["enable-auto-multi-buffer"]
