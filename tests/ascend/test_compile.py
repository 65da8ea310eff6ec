"""Every kernel through the real toolchain up to HIVM, for every target, and what is read off the result."""

import os
import random
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import pytest
import triton
import triton.language as tl

from nsa import files
from nsa.ascend import compile as pipeline
from nsa.ascend import hivm
from nsa.ascend.launches import Shape, launches_of
from nsa.ascend.sweep import legal_grid, sweep
from nsa.ascend.targets import MODELLED, TARGETS, find_target, one_of_each_class

USUAL = Shape(32, 16, 8, 128, "bf16")
BOTH = [target for target, _ in one_of_each_class(MODELLED.values())]


def compiled(launch, target):
    return pipeline.compile_kernel(launch.kernel, launch.signature, launch.constants, target)


# to the compiler, chips of one class differ in their names and core counts alone
@pytest.mark.parametrize("name", [target.name for target in BOTH])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_kernel_compiles_for_a_chip_of_each_class(dtype, name):
    target = TARGETS[name]
    launches = launches_of(Shape(32, 16, 8, 128, dtype), target)
    cube_family = {"A2": 4, "A5": 6}[target.generation]  # the fused kernels repair by themselves
    assert len(launches) == 3 + (0 if dtype == "fp32" else cube_family) + 1  # for decode and prefill
    for launch in launches:
        facts = compiled(launch, target).facts
        assert facts["core"] in {"cube": ("aic", "mix"), "fused": ("mix",)}.get(launch.name.split("_")[-2], ("aiv",))
        assert facts["multi_buffered"]
        assert facts["scalar_accesses"] == 0
        assert not facts["switched_off"]
        for memory, used in facts["memory"].items():
            assert 0 < used <= getattr(target, memory.lower())


@pytest.mark.parametrize("name", MODELLED)
def test_every_modelled_chip_is_compiled_for(name):
    """One kernel: what comes of the others is the same for all chips of a class."""
    launches = launches_of(USUAL, TARGETS[name])
    launch = launches[3]  # the cube family's forward, on A2 and A3 with all that belongs to it
    a5 = TARGETS[name].generation == "A5"
    assert launch.name == ("forward_cube_kernel" if a5 else "forward_fused_kernel")
    assert compiled(launch, TARGETS[name]).facts["core"] == ("aic" if a5 else "mix")


def test_sample_of_the_grid():
    """Six shapes are 108 kernels, half a second each; all of the grid is `make sweep`."""
    summary = sweep(random.Random(0).sample(legal_grid(), 6), list(MODELLED.values()), workers=2, progress=False)
    assert summary["cases"] == 6 * (8 + 10)  # of A2 and A3, and of A5
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


def test_a_module_is_parsed_once():
    artefacts = compiled(launches_of(USUAL, BOTH[0])[0], BOTH[0])
    with mock.patch.object(hivm, "parse", wraps=hivm.parse) as parse:
        assert artefacts.facts == artefacts.facts
        assert hivm.transfers_of(artefacts.module)
    parse.assert_called_once_with(artefacts.generic)


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
def scaled(x, factor, y, K: tl.constexpr, SHIFT: tl.constexpr = 3):
    o = tl.arange(0, K)
    tl.store(y + o, tl.load(x + o) * factor + SHIFT)


def parameters_of(signature, constants):
    ttir = pipeline.compile_kernel(scaled, signature, constants, BOTH[0]).ttir
    return re.findall(r"%arg\d: (\S+)", re.search(r"tt\.func public.*", ttir).group())


@pytest.mark.parametrize(("type_", "in_ttir"), [("fp16", "f16"), ("bf16", "bf16"), ("fp32", "f32"), ("i64", "i64")])
def test_signature_is_bound_by_name(type_, in_ttir):
    """In any order, with float scalars, and with the default of a constexpr."""
    signature = {"factor": type_, "y": "*fp32", "x": "*bf16"}
    assert parameters_of(signature, {"K": 64}) == ["!tt.ptr<bf16>", in_ttir, "!tt.ptr<f32>"]


def test_an_argument_may_be_a_constant():
    assert parameters_of({"y": "*fp32", "x": "*bf16"}, {"K": 64, "factor": 2.5}) == ["!tt.ptr<bf16>", "!tt.ptr<f32>"]


GOOD = {"x": "*bf16", "factor": "fp32", "y": "*fp32"}
A2, K = BOTH[0], {"K": 64}
UNBOUND = {
    "plain function": (scaled.fn, GOOD, K, A2, TypeError, "expected a function with @triton.jit"),
    "target": (scaled, GOOD, K, "Ascend910B3", TypeError, "expected a Target, such as .*, got 'Ascend910B3'"),
    "signature": (scaled, "*bf16", K, A2, TypeError, r"signature \{argument: type\} as a dict, got '\*bf16'"),
    "constants": (scaled, GOOD, None, A2, TypeError, r"constants \{argument: value\} as a dict, got None"),
    "wrong name": (scaled, GOOD | {"z": "i32"}, K, A2, ValueError, "which has x, factor, y, K, SHIFT, got 'z'"),
    "wrong constant": (scaled, GOOD, {"k": 64}, A2, ValueError, "constants: expected arguments of .*, got 'k'"),
    "no constexpr": (scaled, GOOD, {}, A2, ValueError, "expected a value for K, a tl.constexpr of scaled, got none"),
    "no type": (scaled, {"x": "*bf16"}, K, A2, ValueError, "expected a type for factor of scaled, got none"),
    "both": (scaled, GOOD | {"K": "i32"}, K, A2, ValueError, "expected K in .* or in .*, got it in both"),
    "type": (scaled, GOOD | {"factor": "float"}, K, A2, ValueError, "one of i1, .*, got 'float' for factor"),
}


@pytest.mark.parametrize("name", UNBOUND)
def test_what_cannot_be_bound(name):
    *arguments, error, message = UNBOUND[name]
    with pytest.raises(error, match=message):
        pipeline.compile_kernel(*arguments)


def test_fp64_is_an_error_of_one_line():
    with pytest.raises(pipeline.CompileError, match=r"^hivm: LLVM ERROR: unsupported datatype .*$"):
        pipeline.compile_kernel(scaled, GOOD | {"factor": "fp64"}, {"K": 64}, BOTH[0])


def test_programs_run_from_the_cache_not_from_tmpdir(tmp_path, monkeypatch):
    """TMPDIR may be mounted without leave to run programs."""
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("NSA_CACHE_DIR", str(cache))
    with mock.patch.object(subprocess, "run", wraps=subprocess.run) as run:
        pipeline.compile_kernel(square, SQUARE, {"K": 64}, BOTH[1])
    compiler = next(call for call in run.call_args_list if "bishengir-compile" in str(call.args[0][0]))
    stand_ins = compiler.kwargs["env"]["PATH"].split(os.pathsep)[0]
    assert shutil.which("hivmc-a5", path=compiler.kwargs["env"]["PATH"]) == f"{stand_ins}/hivmc-a5"
    assert Path(stand_ins).parent == cache
    for call in run.call_args_list:
        assert not str(call.args[0][0]).startswith(str(temporary))


def test_a_stand_in_that_others_may_write_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        folder = pipeline._stand_ins()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "hivmc")] == [0o700, 0o755]
    (folder / "hivmc").write_text("")  # cut off
    assert (pipeline._stand_ins() / "hivmc").read_bytes() == pipeline._HIVMC
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match=r"hivmc is not run: others than its owner may write to .*stand-ins"):
        pipeline._stand_ins()


@triton.jit
def plus(x):
    return x + 1


@triton.jit
def times(x):
    return x * 7


def test_key_has_the_kind_of_a_constant_and_a_functions_source():
    def key(value):
        return pipeline.content_key(square, SQUARE, {"K": value}, BOTH[0])

    assert len({key(value) for value in (64, "64", 64.0, tl.float32, "fp32", plus, times)}) == 7
    assert key(64) == key(64)


def test_where_no_program_can_run_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(pipeline, "_HIVMC", b"#!/no/such/shell\n")
    with pytest.raises(RuntimeError, match=r"programs cannot run in .*stand-ins \(.*NSA_CACHE_DIR must name a folder"):
        pipeline.compile_kernel(square, SQUARE, {"K": 64}, BOTH[0])


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """As with a home folder that is read-only: a folder of this process alone, and a warning."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(files, "_temporary_dirs", {})
    with pytest.warns(RuntimeWarning, match="kept for this process alone"):
        first = pipeline.compile_kernel(square, SQUARE, {"K": 64}, BOTH[0])
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("compiled again")):
        assert pipeline.compile_kernel(square, SQUARE, {"K": 64}, BOTH[0]) == first


@triton.jit
def conditional(x, y, n, K: tl.constexpr):
    o = tl.arange(0, K)
    for i in range(n):
        tl.store(y + i * K + o, tl.load(x + i * K + o) * 2)
    if n > 5:
        tl.store(y + o, tl.load(x + o) + 1)


@pytest.mark.parametrize("target", BOTH, ids=lambda target: target.name)
def test_an_if_is_no_loop(target):
    """One transfer each way in a loop, one each way in an `if`: by hand from the kernel above."""
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32"}
    made = pipeline.compile_kernel(conditional, signature, {"K": 64}, target)
    assert ("cf.cond_br" if target.generation == "A5" else "scf.if") in made.hivm
    depths = sorted((transfer["argument"], transfer["depth"]) for transfer in hivm.transfers_of(made.module))
    assert depths == [(0, 0), (0, 1), (1, 0), (1, 1)]


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
