"""docs/evidence/simulated.json: the targets, what docs/performance.md says of it, and that the simulator gives it."""

import json
import re
from pathlib import Path

import pytest

from nsa.ascend.roofline.model import documents
from nsa.ascend.simulator.calls import OPS, WORKLOADS, ratio, simulate_call
from nsa.ascend.targets import find_target

ROOT = Path(__file__).parents[2]
BEFORE, NOW = (
    json.loads((ROOT / f"docs/evidence/{name}.json").read_text()) for name in ("simulated_before", "simulated")
)
DOCUMENT = (ROOT / "docs/performance.md").read_text()
USUAL = "T {}k N {} D 128 block 32 stride 16"


def record(records, workload, target="Ascend910B3"):
    return next(r for r in records if (r["workload"], r["target"]) == (workload, target))


def tasks(record):
    return [record[op]["tasks"] for op in OPS]


def seconds(record, ops):
    return sum(record[op]["kernels"] + record[op]["tasks"] * record["task"] for op in ops)


def cells(record):
    return f"{ratio(record, OPS[:1]):.2f} | {ratio(record):.2f} | {'+'.join(map(str, tasks(record)))}"


def test_ratio_by_hand():
    one = {"kernels": 3e-6, "tasks": 2, "limit": 4e-6}
    other = {"kernels": 5e-6, "tasks": 1, "limit": 2e-6}
    call = {"task": 1e-6, "forward": one, "grad_input": other, "grad_weight": other}
    assert ratio(call, OPS[:1]) == pytest.approx(5 / 4)
    assert ratio(call) == pytest.approx((5 + 6 + 6) / 8)


def test_targets():
    long, short = (record(NOW, USUAL.format(k, 8)) for k in (128, 8))
    assert ratio(long, OPS[:1]) <= 1.15
    assert ratio(long) <= 1.25
    assert tasks(short)[0] <= 2
    assert sum(tasks(short)) <= 6
    assert len(NOW) == len(BEFORE) == 28
    for now in NOW:
        before = record(BEFORE, now["workload"], now["target"])
        assert ratio(now, OPS[:1]) <= ratio(before, OPS[:1])
        assert ratio(now) <= ratio(before)


def test_the_documentation_has_the_numbers():
    for now in NOW:
        if now["target"] == "Ascend910B3":
            workload = re.sub(r" block (\d+) stride (\d+)", r", \1/\2", now["workload"])
            assert f"| {workload} | {cells(record(BEFORE, now['workload']))} | {cells(now)} |" in DOCUMENT
    two, one = (record(NOW, USUAL.format(32, n)) for n in (8, 16))
    times = {f"{1e6 * n * seconds(call, ops):.0f}" for n, call in ((2, two), (1, one)) for ops in (OPS[:1], OPS)}
    assert times == {"171", "536", "155", "466"}
    text = " ".join(DOCUMENT.split())
    assert "one call takes 155 us forward and 466 us for all three ops, two calls take 171 and 536 us" in text


def test_the_simulator_gives_them():
    work = WORKLOADS[0]
    again = simulate_call(work, documents(work.rows), find_target("Ascend910B3"), "cube")
    kept = record(NOW, str(work))
    for op in OPS:
        assert again[op]["tasks"] == kept[op]["tasks"]
        assert again[op]["limit"] == pytest.approx(kept[op]["limit"])
        assert again[op]["kernels"] == pytest.approx(kept[op]["kernels"], rel=0.01)  # the JSON is not made anew for 1 %
