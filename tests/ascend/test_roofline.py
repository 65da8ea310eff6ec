"""The roofline model: its targets, its parts against counts by hand, and the command."""

import json

import numpy as np
import pytest

from nsa.ascend import __main__ as command_line
from nsa.ascend import roofline
from nsa.ascend.targets import TARGETS

B3 = TARGETS["Ascend910B3"]


def test_usual_shape_is_near_the_limit():
    x_limit = roofline.report(roofline.USUAL, B3, "cube")["x_limit"]
    assert 1 < x_limit["forward"] <= 1.15
    assert 1 < x_limit["both"] <= 1.35


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("shape", roofline.SHAPES, ids=str)
def test_no_kernel_is_faster_than_its_bytes(shape, target):
    """Tail rows in no window are never read, so a whole op may be a little faster than the limit."""
    for family in roofline.FAMILIES:
        for op, kernels in roofline.model(shape, target, family).items():
            assert (
                sum(kernel.seconds(target) for kernel in kernels) > 0.97 * roofline.limit(shape, op) / target.ddr_read
            )
            for kernel in kernels:
                assert kernel.seconds(target) >= kernel.bytes / target.ddr_read


def test_by_hand(monkeypatch):
    """One document of 784 rows on one core: two tiles of 24 windows, which share 16 rows."""
    monkeypatch.setattr(roofline, "documents", lambda rows: (784,))
    target = B3.__class__(**(B3.__dict__ | {"cube_cores": 1, "vector_cores": 2, "ddr_read": 32 * B3.clock}))
    shape = roofline.Shape(784, 2, 128, 32, 16)
    _, forward, check = roofline.model(shape, target, "cube")["forward"]
    row = 2 * 128 * 2
    band = 2 * 32 * 400 * 2
    assert forward.bytes == 784 * row + 48 * row + band
    assert forward.macs == 2 * 2 * 32 * 400 * 128
    assert forward.cycles["MTE2"] == pytest.approx((784 * row + band) / 32 + 16 * row / 110)
    assert forward.cycles["M"] == forward.macs / 16**3
    assert forward.cycles["FIX"] == pytest.approx(48 * row / 86)
    assert forward.cycles["MTE1"] == pytest.approx(2 * (band / 512 + 400 * row / 256))
    assert check.bytes == 48 * row

    (vector,) = roofline.model(shape, target, "vector")["forward"]
    assert vector.bytes == 784 * row + 48 * row
    assert vector.cycles["V"] == 48 * 32 * 256 * 3 / 64 / 2  # of one of two cores
    assert vector.cycles["MTE3"] == 48 * row / 64 / 2


def test_documents_fill_the_rows():
    for rows in (8192, 131072):
        ends = roofline.documents(rows)
        assert ends[-1] == rows
        assert all(np.diff((0, *ends)) > 0)


def test_command(capsys, tmp_path):
    assert command_line.main(["roofline", "--targets", "Ascend910B3", "Ascend950PR_9589", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Ascend950PR_9589: modelled, not measured" in printed
    content = json.loads((tmp_path / "roofline.json").read_text())
    assert content["what"] == "modelled, not measured"
    assert len(content["reports"]) == 2 * 2 * len(roofline.SHAPES)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
