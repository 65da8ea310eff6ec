"""The benchmark on tiny shapes: what is wrong has no time, and the JSON makes every report."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import nsa
from nsa import cpu

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_compress
import bench_decode
import bench_overhead
import grid
import implementations
import report
import report_decode

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


def test_decode(monkeypatch, tmp_path, capsys):
    """Every case has times of all that is compared; the JSON makes the table and the plot."""
    path = tmp_path / "decode.json"
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", "--quick", "--out", str(tmp_path / "decode")])
    bench_decode.main()
    results = json.loads(path.read_text())
    assert set(results["header"]) > {"commit", "threads", "freed_memory"}
    assert (len(results["decode"]), len(results["prefill"])) == (4, 2)
    for part, names in (("decode", set(report_decode.NAMES)), ("prefill", {"append", "forward"})):
        for case in results[part]:
            assert set(case["results"]) == names
            for name in names:
                found = case["results"][name]
                assert found["rounds"] >= 3
                assert 0 < found["p20"] <= found["p50"] <= found["p80"]
    written = {tmp_path / f"decode.{ending}": (tmp_path / f"decode.{ending}").read_bytes() for ending in ("md", "png")}
    assert written[tmp_path / "decode.md"].decode() in capsys.readouterr().out
    for old in written:
        old.unlink()
    report_decode.write_report(path)
    assert (tmp_path / "decode.md").read_bytes() == written[tmp_path / "decode.md"]
    assert (tmp_path / "decode.png").exists()


@pytest.mark.parametrize("name", ["nsa_compress_infer", "nsa_compress_append"])
@pytest.mark.parametrize("fault", ["off by 2 %", "one row too many"])
def test_decode_that_is_wrong_is_not_timed(monkeypatch, name, fault):
    right = getattr(nsa, name)

    def wrong(*args, cache, **kwargs):
        right(*args, cache=cache, **kwargs)
        if fault == "off by 2 %":
            return cache.mul_(1.02)
        cache[-1].mul_(0.5)
        return cache

    monkeypatch.setattr(nsa, name, wrong)
    with pytest.raises(AssertionError, match=r"elements off|no due window has"):
        bench_decode.measure_step(bench_decode.Step(4, 1024, 2), torch.device("cpu"), 1)


def test_decode_places():
    """Windows are due where the case says so; calls in a rotation read other pages and write other rows."""
    case = bench_decode.Step(6, 1024, 3, block=64, stride=32)
    places, n_pages = bench_decode.step_places(case, torch.device("cpu"))
    assert len(places) == bench_decode.PLACES // 3
    used = []
    for place in places:
        due = (place.after - case.block) % case.stride == 0
        assert due.sum() == case.due
        assert ((place.slots >= 0) == due).all()
        assert (place.after <= case.length).all()
        assert place.after.tolist() == place.lengths
        used += [page for pages in place.table.tolist() for page in set(pages) - {0}]
    assert len(used) == len(set(used))
    assert max(used) < n_pages


def test_an_empty_op_has_the_signature_of_ours():
    for op in (torch.ops.nsa.nsa_compress_infer.default, torch.ops.nsa.nsa_compress_append.default):
        other = bench_decode.empty(op, torch.device("cpu"))
        assert str(other._schema).partition("(")[2] == str(op._schema).partition("(")[2]


def test_decode_help_explains_every_option():
    text = subprocess.run(
        [sys.executable, bench_decode.__file__, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in ("--device", "--quick", "--out"):
        assert option in text


def test_the_documentation_has_the_times_of_decode():
    """docs/performance.md, of the JSON beside decode.md."""
    root = Path(__file__).parents[1]
    path, document = root / "benchmarks/results/decode.json", (root / "docs/performance.md").read_text()
    results = json.loads(path.read_text())
    assert report_decode.markdown(results) == path.with_suffix(".md").read_text()
    shape = {"block": 32, "length": 16_384, "dtype_name": "bf16", "memory": "rotating"}
    shown = [case for case in results["decode"] if all(case[key] == value for key, value in shape.items())]
    assert len(shown) == 14
    for case in shown:
        times = [f"{report_decode.p50(case, name) * 1e6:,.0f}" for name in report_decode.NAMES]
        gather = report_decode.p50(case, "gather")
        ratios = [f"{gather / report_decode.p50(case, name):.2f}" for name in ("infer", "append")]
        assert report.row([case["batch"], case["due"], *times, *ratios]) in document
    for case in results["prefill"]:
        times = [report_decode.p50(case, name) for name in ("append", "forward")]
        cells = [f"{case['chunk']:,}", case["decodes"], *(f"{1e3 * t:.1f}" for t in times)]
        assert report.row([*cells, f"{times[0] / times[1]:.2f}"]) in document
