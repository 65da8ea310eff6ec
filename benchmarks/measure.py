"""Clocks, memory, and what machine this is."""

import csv
import ctypes
import os
import platform
import subprocess
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "triton-ascend", "triton", "torch_npu", "fla-core")
FLUSHED = 1 << 28  # bytes written between two measurements on a GPU, more than its L2 cache holds


def seconds(function, device):
    """How long one call takes, from its start to the end of its last kernel."""
    if device.type == "cuda":
        torch.empty(FLUSHED, dtype=torch.int8, device=device).zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3
    if device.type == "npu":
        return _npu_seconds(function)
    return wall_seconds(function, device)


def wall_seconds(function, device):
    """How long one call takes on the clock of the host, to the end of what it started on the device, if anything."""
    wait = torch.get_device_module(device).synchronize if device.type != "cpu" else lambda: None
    wait()
    begin = time.perf_counter()
    result = function()
    wait()
    taken = time.perf_counter() - begin
    del result  # after the clock was read: freeing the result is not part of the call
    return taken


def peak_bytes(function, device):
    """The most memory that a call takes while it runs, its result included; None where this cannot be read."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        function()
        module.synchronize()
        return module.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that memory freed before does not hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def quantiles(times):
    """Of seconds: how many there are, their median, and what one in five and four in five stay below."""
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return {"rounds": len(times), "p20": p20, "p50": p50, "p80": p80}


def header(device):
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent, capture_output=True
    )
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.decode().strip() or "unknown",
        "device": device.type,
        "machine": _machine(device),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": round(os.getloadavg()[0], 1),  # a busy machine shows here
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _npu_seconds(function):
    """The sum over all kernels; triton.testing.do_bench_npu gives the first kernel alone."""
    import torch_npu

    profiler = torch_npu.profiler
    with tempfile.TemporaryDirectory() as folder:
        with profiler.profile(
            activities=[profiler.ProfilerActivity.NPU], on_trace_ready=profiler.tensorboard_trace_handler(folder)
        ):
            function()
            torch.npu.synchronize()
        (statistic,) = Path(folder).rglob("op_statistic.csv")
        with statistic.open(newline="") as file:
            return sum(float(row["Total Time(us)"]) for row in csv.DictReader(file)) / 1e6


def _machine(device):
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    models = [
        line.partition(":")[2].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith(("model name", "CPU implementer"))
    ]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _status(key):
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(key))


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
