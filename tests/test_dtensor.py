"""DTensors: what 2 and 4 processes compute is what one does. And that nobody pays for it who has none."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nsa.importing import after_import

RANKS = Path(__file__).with_name("ranks.py")


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_compute_what_one_process_does(n_ranks, tmp_path):
    command = [sys.executable, "-W", "error", RANKS]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    outputs = [tmp_path / f"rank{rank}" for rank in range(n_ranks)]
    processes = []
    try:
        for rank, path in enumerate(outputs):
            with path.open("w") as output:
                arguments = [*command, str(rank), str(n_ranks), tmp_path / "store"]
                processes.append(subprocess.Popen(arguments, env=variables, stdout=output, stderr=output))
        wait(processes, seconds=300)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [path.read_text()[-3000:] for path, process in zip(outputs, processes) if process.returncode]
    assert not failed, "\n\n".join(failed)


def wait(processes, seconds):
    """Until all have ended, or for some time more after one has failed, or for `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and None in [process.poll() for process in processes]:
        if any(process.returncode for process in processes):
            end = min(end, time.monotonic() + 5)
        time.sleep(0.1)


def test_the_package_imports_no_dtensors():
    code = """
import sys, torch, nsa
assert "torch.distributed.tensor" not in sys.modules
sys.modules["torch.distributed.tensor"] = None  # as in a PyTorch without torch.distributed
y = nsa.nsa_compress(torch.ones(32, 1, 16).half(), torch.ones(32, 1).half(), 32, 16, actual_seq_len=[32])
assert (y == 32).all()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.fixture
def late(tmp_path, monkeypatch):
    """The file of a module that nobody has imported."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "late_module.py"
    sys.modules.pop("late_module", None)


def test_action_after_an_import(late):
    late.write_text("value = 1")
    finders, calls = list(sys.meta_path), []
    after_import("late_module", lambda: calls.append(sys.modules["late_module"].value))
    spec = importlib.util.find_spec("late_module")
    assert spec.origin == str(late)
    assert calls == []  # to look is not to import
    module = importlib.import_module("late_module")
    assert calls == [1]
    assert sys.meta_path == finders
    importlib.reload(module)
    spec.loader.exec_module(module)
    assert calls == [1]
    after_import("late_module", lambda: calls.append(2))  # it is there already
    assert calls == [1, 2]


def test_action_after_an_import_that_failed_before(late):
    calls = []
    after_import("late_module", lambda: calls.append(1))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("late_module")
    late.write_text("raise RuntimeError('half')")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="half"):
        importlib.import_module("late_module")
    assert calls == []
    late.write_text("")
    importlib.invalidate_caches()
    importlib.import_module("late_module")
    assert calls == [1]
