"""The benchmark on tiny shapes: what is wrong has no time, and the JSON makes every report."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from nsa import cpu

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_compress
import bench_overhead
import grid
import implementations
import report

TINY = "300,2,16,32,16,bf16"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_compress.py", *map(str, arguments)])
    bench_compress.main()


def test_times_and_reports(monkeypatch, tmp_path, capsys):
    names = ["native", "operators", "eager", "taps", "conv1d", "fla", "vector"]
    run(monkeypatch, "--shapes", TINY, "300,1,32,16,16,fp32,one", "--impl", *names, "--out", tmp_path / "tiny")
    results = json.loads((tmp_path / "tiny.json").read_text())
    assert torch.__version__.startswith(results["header"]["versions"]["torch"].partition("+")[0])
    for case in results["cases"]:
        assert set(case["results"]) == {*names, "clone", "copy"}
        for name in names[:5]:
            for direction in report.DIRECTIONS:
                found = case["results"][name][direction]
                assert found["rounds"] >= 3
                assert 0 < found["p20"] <= found["p50"] <= found["p80"]
        assert "GPU" in case["results"]["vector"]["none"]
    written = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    assert [path.name for path in written] == ["tiny-limit.png", "tiny-peers.png", "tiny.csv", "tiny.json", "tiny.md"]
    lines = list(csv.DictReader((tmp_path / "tiny.csv").read_text().splitlines()))
    assert len(lines) == 2 * (5 * 3 + 2 + 2)
    assert float(next(r for r in lines if r["implementation"] == "native")["to_ours"]) == 1
    for path in written:
        if path.suffix != ".json":
            path.unlink()
    report.write_report(tmp_path / "tiny.json")
    for path, content in written.items():
        assert path.exists()
        assert path.suffix == ".png" or path.read_bytes() == content


def test_what_is_wrong_has_no_time(monkeypatch):
    right = implementations.native

    def wrong_result(case):
        return lambda x, weight: right(case)(x, weight) * 1.02

    def wrong_gradient(case):
        return lambda x, weight: right(case)(x.detach() + (x - x.detach()) * 2, weight)

    made = {"native": right, "result": wrong_result, "gradient": wrong_gradient}
    monkeypatch.setattr(bench_compress, "IMPLEMENTATIONS", made)
    results = bench_compress.measure(grid.parse(TINY, "cpu"), list(made))
    assert set(results["native"]) == {"forward", "backward", "both"}
    assert results["result"] == {"none": "wrong result"}
    assert set(results["gradient"]) == {"forward"}


def test_new_lengths_at_every_call(monkeypatch):
    """No call finds the table of another one, though two shapes are drawn alike; the report says so."""
    names = ["native", "operators", "fused"]
    shapes = ["600,1,16,32,16,bf16,short", "600,2,16,32,16,bf16,short"]
    monkeypatch.setattr(bench_compress, "ROUNDS", 3)
    seen = Counter()  # lengths of the forward calls
    for backend in (cpu, cpu.operators):
        forward = backend.forward

        def counted(x, weight, table, forward=forward):
            seen[tuple(table.begins[0].tolist())] += 1
            return forward(x, weight, table)

        monkeypatch.setattr(backend, "forward", counted)
    for shape in shapes:
        results = bench_compress.measure(grid.parse(shape, "cpu"), names, new_lengths=True)
        assert results["fused"] == {"none": "is prepared for given lengths"}
        assert all(results[name]["both"]["rounds"] == 3 for name in names[:2])
    proofs = 4  # of two implementations in two shapes, on the same lengths
    assert sorted(seen.values()) == [1] * (len(seen) - 1) + [proofs]
    assert len(seen) > 2 * 2 * 3 * 3  # implementations, shapes, directions, rounds
    ran = {"header": bench_compress.header(torch.device("cpu")), "new_lengths": True, "cases": [], "host": None}
    assert "Every call has segments of other lengths" in report.markdown(ran, "cpu")


def test_one_segment_has_no_other_lengths(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--new-lengths", "--shapes", f"{TINY},one")
    assert "expected segments documents or short with --new-lengths, got" in capsys.readouterr().err


def test_documents_fill_the_rows():
    for text in (TINY, "131072,8,128,32,16,bf16", "10000,4,64,32,16,bf16,short", "77,1,16,16,16,fp16,one"):
        case = grid.parse(text, "cpu")
        assert sum(case.lengths) == case.t
        assert min(case.lengths) >= 1


@pytest.mark.parametrize("shape", ["300,2,16", "300,2,16,32,16,int8", "300,2,16,32,16,bf16,many", "a,2,16,32,16,bf16"])
def test_a_shape_that_is_none(monkeypatch, capsys, shape):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--shapes", shape)
    assert f"T,N,D,block,stride,dtype[,segments], got {shape}" in capsys.readouterr().err


def test_help_explains_every_option():
    text = subprocess.run(
        [sys.executable, bench_compress.__file__, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in ("--device", "--quick", "--shapes", "--new-lengths", "--impl", "--out"):
        assert option in text


def test_overhead(tmp_path):
    """Every part has times, and what it compares has a base."""
    path = tmp_path / "overhead.json"
    command = [sys.executable, bench_overhead.__file__, "--quick", "--out", path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads(path.read_text())
    assert set(results) == {"header", "call_overhead", "many_segments", "batches", "first_compiled_call"}
    del results["header"]
    for part, found in results.items():
        for name, times in found.items():
            assert set(times) == {"wall", "cpu"}
            assert min(times.values()) > 0
            assert f"| {name} | " in printed
            base = bench_overhead.base(part, name, found)
            assert base is None if part == "first_compiled_call" else base in found.values()


def test_turns():
    """Calls take turns, and each has the median of its rounds."""
    order = []
    times = bench_overhead.measured({name: lambda name=name: order.append(name) for name in "ab"}, 3, 2)
    assert "".join(order) == "ab" + "aabb" * 3
    assert set(times) == {"a", "b"}
