import os
import shutil
import tempfile
from importlib import util
from pathlib import Path

import interpreter
import pytest
import torch
from guard import GuardedMemory
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--kernels",
        choices=["interpreter", "host", "simulator", "compiled"],
        default="interpreter",
        help="what runs the Triton kernels: Triton's interpreter, native code by way of the Ascend toolchain, for a "
        "sample of the tests the simulator of Ascend chips, or nothing: they are compiled for GPUs. A process has one "
        "of them: what @triton.jit makes of a function depends on it",
    )
    parser.addoption("--large", action="store_true", help="the tests in tests/large too, which take gigabytes")


def installed_triton():
    """ "ascend" (triton-ascend), "community" or None; found without importing it."""
    spec = util.find_spec("triton")
    if spec is None:
        return None
    return "ascend" if (Path(spec.origin).parent / "backends" / "ascend").exists() else "community"


TRITON = installed_triton()
SIMULATED = ("Ascend910B3", "Ascend910_9392")  # A2; A3, which the same compiler serves, for few tests
# any Triton; the folder `ascend` needs triton-ascend, the folder `gpu` community Triton
NEEDS_TRITON = {"test_append.py", "test_kernels.py", "test_launch.py", "test_machine.py", "test_repair.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if config.getoption("--large") and config.getoption("numprocesses", None):
        raise pytest.UsageError("expected --large without -n, got both: large tests have the memory for one at a time")


def pytest_configure(config):
    # of its own for each process and each run: in a cache that an earlier run has filled, torch.compile finds graphs
    # for shapes that the fake kernels of today may get wrong
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.inductor_cache = tempfile.mkdtemp(prefix="inductor-")
    config.addinivalue_line("markers", "long: too much for the simulator")
    config.addinivalue_line("markers", "every_target: also on the other chips of the simulator")
    if TRITON and config.getoption("--kernels") == "interpreter":
        interpreter.repair()
    if config.getoption("--kernels") == "simulator":
        settings.register_profile("few", settings.get_profile("repeatable"), max_examples=3)
        settings.load_profile("few")


def pytest_unconfigure(config):
    shutil.rmtree(config.inductor_cache)


def pytest_ignore_collect(collection_path, config):
    """The compilers' tests need kernels that are not interpreted, and each its own Triton; neither is anything without
    its Triton. Large tests have to be asked for."""
    folders = {"ascend": ("host", "ascend"), "gpu": ("compiled", "community")}
    needed = {**folders, "test_far_kernels.py": ("host", "ascend")}.get(collection_path.name)
    if needed and needed != (config.getoption("--kernels"), TRITON):
        return True
    if collection_path.name == "large" and not config.getoption("--large"):
        return True
    return True if collection_path.name in NEEDS_TRITON and TRITON is None else None


def pytest_generate_tests(metafunc):
    if metafunc.config.getoption("--kernels") == "simulator":
        everywhere = metafunc.definition.get_closest_marker("every_target")
        targets = SIMULATED if everywhere else SIMULATED[:1]
        metafunc.parametrize("kernels_run", targets, indirect=True, scope="session")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--kernels") == "simulator":
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_terminal_summary(terminalreporter):
    if TRITON != "ascend":
        left_out = sorted(NEEDS_TRITON) if TRITON is None else []
        what = "Triton is not installed" if TRITON is None else "community Triton is installed, triton-ascend is not"
        terminalreporter.write_line(f"left out: {', '.join([*left_out, 'ascend'])} ({what})")


@pytest.fixture(scope="session", autouse=True)
def kernels_run(request):
    kernels = request.config.getoption("--kernels")
    if kernels == "host":
        from nsa.ascend import host_driver

        with host_driver():
            yield
    elif kernels == "simulator":
        import machines

        from nsa.ascend import find_target, simulator_driver

        machines.simulated = find_target(request.param)
        with simulator_driver(machines.simulated):
            yield
    else:
        yield


@pytest.fixture
def interpreted(request):
    return request.config.getoption("--kernels") == "interpreter"


@pytest.fixture
def slow(request):
    return request.config.getoption("--kernels") in ("interpreter", "simulator")


@pytest.fixture
def guarded(monkeypatch):
    """torch.empty gives guarded memory full of NaN; the guards are checked at the end of the test."""
    memory = GuardedMemory()
    monkeypatch.setattr(torch, "empty", memory.empty)
    yield memory
    memory.check()
