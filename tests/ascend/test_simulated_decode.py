"""docs/evidence/decode.json: what docs/performance.md says of it, and that the simulator gives it."""

import json
from pathlib import Path

import pytest

from nsa.ascend import rates
from nsa.ascend.simulator.decode import FORMS, TARGETS, WORKLOADS, Work, own_pages, seconds, simulate_step
from nsa.ascend.targets import find_target

ROOT = Path(__file__).parents[2]
RECORDS = json.loads((ROOT / "docs/evidence/decode.json").read_text())
DOCUMENT = (ROOT / "docs/performance.md").read_text()


def record(work, target="Ascend910B3"):
    return next(r for r in RECORDS if (r["target"], *(r[field] for field in Work._fields)) == (target, *work))


def cells(work):
    found = record(work)
    kernel = f"{1e6 * found['kernel']:.2f}" if found["tasks"] else "none"
    call = seconds(found)
    return f"{kernel} | {1e6 * call:.1f} | {call / found['task']:.2f}"


def test_everything_is_there():
    assert len(RECORDS) == len(TARGETS) * len(WORKLOADS)
    for name in TARGETS:
        for work in WORKLOADS:
            found = record(work, name)
            assert found["task"] == rates.task_overhead(find_target(name))
            launched = work.form != "infer" or work.due > 0
            assert found["tasks"] == launched + (launched and work.form == "infer")
            assert (found["kernel"] > 0) == launched


def test_by_hand():
    """The last of 8,192 + 2,048 rows fill 128 windows, which hold 16 rows more than are new."""
    rate = find_target("Ascend910B3").ddr_read
    for work, rows in ((Work("append", 1, 2048, 1), 2048 + 16 + 128), (Work("append", 64, 1, 4), 4 * (32 + 1))):
        assert record(work)["memory_limit"] == pytest.approx(rows * 8 * 128 * 2 / rate)
    assert Work("infer", 64, 1, 4).most_windows == Work("append", 64, 1, 4).most_windows == 1
    assert Work("append", 1, 2048, 1).most_windows == 128
    assert own_pages(2, 5, 2).tolist() == [[0, 1, 0, 1, 0], [2, 3, 2, 3, 2]]
    assert seconds({"kernel": 3.0, "tasks": 2, "task": 5.0}) == 13


def test_the_documentation_has_the_numbers():
    for batch in (1, 4, 16, 64, 256):
        for due in dict.fromkeys((0, batch // 16, batch)):
            forms = " | ".join(cells(Work(form, batch, 1, due)) for form in FORMS)
            assert f"| {batch} | {due} | {forms} |" in DOCUMENT
    for rows in (512, 2048, 8192):
        work = Work("append", 1, rows, 1)
        assert f"| {rows:,} | {cells(work)} | {1e6 * record(work)['memory_limit']:.2f} |" in DOCUMENT


@pytest.mark.parametrize("work", [Work("infer", 4, 1, 4), Work("append", 16, 1, 1), Work("append", 1, 512, 1)], ids=str)
def test_the_simulator_gives_them(work):
    again, kept = simulate_step(work, find_target("Ascend910B3")), record(work)
    assert again["tasks"] == kept["tasks"]
    assert again["memory_limit"] == pytest.approx(kept["memory_limit"])
    assert again["kernel"] == pytest.approx(kept["kernel"], rel=0.01)  # the JSON is not made anew for 1 %
