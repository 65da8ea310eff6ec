"""The memory that large tests took."""

import resource

import pytest

MOST = 20  # GB


def peak():
    """GB that this process has had at once so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@pytest.fixture(scope="session", autouse=True)
def memory():
    yield
    assert peak() <= MOST, f"expected at most {MOST} GB of memory, took {peak():.1f} GB"


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"peak memory: {peak():.1f} GB")
