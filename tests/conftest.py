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
        choices=["interpreter", "host", "compiled"],
        default="interpreter",
        help="what runs the Triton kernels: Triton's interpreter, native code by way of the Ascend toolchain, or "
        "nothing: they are compiled for GPUs. A process has one of them: what @triton.jit makes of a function "
        "depends on it",
    )


def pytest_configure(config):
    if config.getoption("--kernels") == "interpreter":
        interpreter.repair()


def pytest_ignore_collect(collection_path, config):
    """The compilers' tests need kernels that are not interpreted, and each its own Triton."""
    needed = {"ascend": "host", "gpu": "compiled"}.get(collection_path.name)
    return True if needed and config.getoption("--kernels") != needed else None


@pytest.fixture(scope="session", autouse=True)
def kernels_run(request):
    if request.config.getoption("--kernels") != "host":
        yield
    else:
        from nsa.ascend.host import host_driver

        with host_driver():
            yield


@pytest.fixture
def guarded(monkeypatch):
    """torch.empty gives guarded memory full of NaN; the guards are checked at the end of the test."""
    memory = GuardedMemory()
    monkeypatch.setattr(torch, "empty", memory.empty)
    yield memory
    memory.check()
