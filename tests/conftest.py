import interpreter
import pytest
import torch
from guard import GuardedMemory
from hypothesis import HealthCheck, settings

interpreter.repair()
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("repeatable")


@pytest.fixture
def guarded(monkeypatch):
    """torch.empty gives guarded memory full of NaN; the guards are checked at the end of the test."""
    memory = GuardedMemory()
    monkeypatch.setattr(torch, "empty", memory.empty)
    yield memory
    memory.check()
