"""The lowering under versions of triton-ascend that cannot be installed: stand-ins for what 3.2.1 moved and changed."""

import importlib
import json
import subprocess
import sys
from unittest import mock

import pytest
from triton.backends import backends
from triton.compiler import ASTSource

import nsa.ascend
from nsa.ascend import __main__ as command_line
from nsa.ascend import compile as pipeline
from nsa.ascend.launches import Shape, launches_of
from nsa.ascend.targets import TARGETS
from nsa.kernels import triton_ascend

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
        if "cube" in launch.name:
            _, linalg = pipeline._lower(launch.kernel, launch.signature, launch.constants, TARGETS[name])
            print(json.dumps([name, launch.name, linalg]))
"""


def test_extract_slice_where_3_2_1_has_it():
    """In a process of its own, as a kernel keeps what it found when it was first compiled."""
    run = subprocess.run([sys.executable, "-c", MOVED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    moved = [json.loads(line) for line in run.stdout.splitlines()]
    launches = [(launch, target) for target in (A2, A5) for launch in launches_of(USUAL, target)]
    cube = [(launch, target) for launch, target in launches if "cube" in launch.name]
    assert moved == [[target.name, launch.name, lower(launch, target)[1]] for launch, target in cube]
    assert [launch.constants["HEADS"] > 1 for launch, _ in cube] == 3 * [True] + 3 * [False]  # sliced, and not


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
        triton_ascend.check_a5("Ascend950PR_9589")


@pytest.fixture
def community_triton(monkeypatch):
    """As if that were installed, in place of triton-ascend."""
    monkeypatch.setattr(triton_ascend, "_version", {"triton": "3.6.0"}.get)
    triton_ascend.check_toolchain.cache_clear()
    yield "what is installed is triton 3.6.0: install nsa-ascend[ascend]"
    triton_ascend.check_toolchain.cache_clear()


@pytest.mark.parametrize("command", ["report --target Ascend910B3", "roofline", "sweep --out x"])
def test_every_command_says_which_triton_it_needs(command, community_triton, capsys):
    assert command_line.main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert community_triton in line


def test_the_functions_say_so_too(community_triton):
    launch = launches_of(USUAL, A2)[0]
    for call in (
        lambda: nsa.ascend.host_driver,  # imported when it is asked for
        lambda: pipeline.compile_kernel(launch.kernel, launch.signature, launch.constants, A2),
        lambda: importlib.reload(sys.modules["nsa.ascend.host"]),
    ):
        with pytest.raises(ImportError) as caught:
            call()
        assert community_triton in str(caught.value)
