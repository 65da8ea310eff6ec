"""The lowering under versions of triton-ascend that cannot be installed: stand-ins for what 3.2.1 moved and changed."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from unittest import mock

import pytest
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import MLIRCompilationError

import nsa.ascend
from nsa import triton_ascend
from nsa.ascend import __main__ as command_line
from nsa.ascend import compile as pipeline
from nsa.ascend.launches import Shape, launches_of
from nsa.ascend.targets import TARGETS

A2, A5 = TARGETS["Ascend910B3"], TARGETS["Ascend950PR_9589"]
Backend = backends["ascend"].compiler
USUAL = Shape(32, 16, 8, 128, "bf16")

MOVED = """
import json, sys, types
import triton.language as tl

extension = types.ModuleType("triton.language.extra.cann.extension")
extension.extract_slice = tl.extract_slice
sys.modules[extension.__name__] = extension
del tl.extract_slice

from nsa.ascend import compile as pipeline
from nsa.ascend.launches import Shape, launches_of
from nsa.ascend.targets import TARGETS

for name in ("Ascend910B3", "Ascend950PR_9589"):
    for launch in launches_of(Shape(32, 16, 8, 128, "bf16"), TARGETS[name]):
        if "cube" in launch.name or "fused" in launch.name:
            _, linalg = pipeline._lower(launch.kernel, launch.signature, launch.constants, TARGETS[name])
            print(json.dumps([name, launch.name, linalg]))
"""


def test_extract_slice_where_3_2_1_has_it():
    """In a process of its own, as a kernel keeps what it found when it was first compiled."""
    run = subprocess.run([sys.executable, "-c", MOVED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    moved = [json.loads(line) for line in run.stdout.splitlines()]
    launches = [(launch, target) for target in (A2, A5) for launch in launches_of(USUAL, target)]
    cube = [(launch, target) for launch, target in launches if "cube" in launch.name or "fused" in launch.name]
    assert moved == [[target.name, launch.name, lower(launch, target)[1]] for launch, target in cube]
    assert [launch.constants.get("HEADS", 1) > 1 for launch, _ in cube] == 3 * [True] + 3 * [False]  # cut, and not


def lower(launch, target):
    return pipeline._lower(launch.kernel, launch.signature, launch.constants, target)


def lower_first(target):
    return lower(launches_of(USUAL, target)[0], target)


def test_a_failure_in_the_process_is_a_compile_error():
    def add_stages(self, stages, options):
        stages["ttir"] = lambda module, metadata: module
        stages["ttadapter"] = mock.Mock(side_effect=RuntimeError("PassManager::run failed"))

    with (
        mock.patch.object(Backend, "add_stages", add_stages),
        pytest.raises(pipeline.CompileError, match="ttadapter: PassManager::run failed") as caught,
    ):
        lower_first(A2)
    assert caught.value.stage == "ttadapter"


def test_the_backend_may_replace_make_ir_when_it_is_asked_for_its_functions():
    """As 3.2.1 does, to note the target in the module: the very first module has to have the note."""
    made = []
    make_ir, implementation = ASTSource.make_ir, Backend.get_codegen_implementation

    def replacement(self, *args):
        made.append(self.name)
        return make_ir(self, *args)

    def replace(self):
        ASTSource.make_ir = replacement
        return implementation(self)

    with (
        mock.patch.object(ASTSource, "make_ir", make_ir),
        mock.patch.object(Backend, "get_codegen_implementation", replace),
    ):
        lower_first(A2)
    assert made == ["forward_vector_kernel"]


@pytest.mark.parametrize(("target", "a5"), [(A2, False), (A5, True)], ids=["A2", "A5"])
def test_the_target_decides_the_generation(target, a5):
    """From 3.2.1 on the default is what card is in the machine, in 3.2.0 it is never A5."""
    said = {}
    parse_options = Backend.parse_options

    def spy(self, options):
        said.update(options)
        return parse_options(self, options)

    with mock.patch.object(Backend, "parse_options", spy):
        lower_first(target)
    assert said["compile_on_910_95"] is a5


def test_3_2_0_compiles_for_no_a5():
    with pytest.raises(RuntimeError, match=r"Ascend950PR_9589 is a chip of generation A5, and triton-ascend 3\.2\.0"):
        triton_ascend.check_a5(GPUTarget("npu", "Ascend950PR_9589", 0))


@pytest.fixture
def community_triton(monkeypatch):
    """As if that were installed, in place of triton-ascend."""
    monkeypatch.setattr(triton_ascend, "_version", {"triton": "3.6.0"}.get)
    triton_ascend.toolchain_fault.cache_clear()
    yield "what is installed is triton 3.6.0: install nsa-ascend[ascend]"
    triton_ascend.toolchain_fault.cache_clear()


def test_the_command_line_says_which_triton_it_needs(community_triton, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.reload(command_line)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert community_triton in line


def test_the_functions_say_so_too(community_triton):
    launch = launches_of(USUAL, A2)[0]
    for call in (
        lambda: nsa.ascend.host_driver,  # imported when it is asked for
        lambda: pipeline.compile_kernel(launch.kernel, launch.signature, launch.constants, A2),
        lambda: importlib.reload(sys.modules["nsa.ascend.cpu_driver"]),
    ):
        with pytest.raises(ImportError) as caught:
            call()
        assert community_triton in str(caught.value)


ON_AN_NPU = """
from nsa import triton_ascend

triton_ascend._version = {"triton-ascend": "3.6.0"}.get
from nsa.ascend.targets import target_of_device  # what the op does on a device
from triton.backends import backends

print(target_of_device("Ascend910B3").name, sorted(backends))
"""


def test_an_npu_machine_may_have_versions_that_nsa_ascend_cannot_drive():
    """The op asks for the chip's sizes there; nothing of the offline tools comes along, and nothing is registered."""
    run = subprocess.run([sys.executable, "-c", ON_AN_NPU], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("Ascend910B3 ['ascend']\n", "")


@pytest.mark.parametrize("call", ["runpy.run_module('nsa.ascend', run_name='__main__')", "nsa.ascend.host_driver()"])
def test_a_mixture_is_named_before_triton_breaks(call, tmp_path):
    """With both packages installed, triton does not survive its import: nothing may try that first."""
    folder = tmp_path / "triton-3.6.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.6.0\n")
    (tmp_path / "triton.py").write_text("raise ImportError('cannot import name Language')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", f"import runpy, nsa.ascend; {call}"], capture_output=True, text=True, env=environment
    )
    *before, last = run.stderr.splitlines()
    assert "triton-ascend 3.2.0 and triton 3.6.0 are both installed" in last
    assert run.returncode
    assert "runpy" not in call or (not before and run.returncode == 2)


def test_a_crash_of_the_compiler_is_tried_again():
    crash = "PLEASE submit a bug report to https://github.com/llvm/llvm-project/issues/"
    for words, attempts in ((("ub overflow",), 1), ((crash, crash, "ub overflow"), 3), ((crash,) * 9, 5)):
        said = iter(words)

        def launch(said=said):
            raise MLIRCompilationError("ConvertLinalgRToBinary", next(said))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(MLIRCompilationError, match=words[attempts - 1]):
                triton_ascend.launch_again_after_a_crash(launch)
        assert [str(warning.message)[-14:] for warning in caught] == [f"attempt {i} of 5" for i in range(1, attempts)]
        assert len(list(said)) == len(words) - attempts
    assert triton_ascend.launch_again_after_a_crash(lambda: 7) == 7
