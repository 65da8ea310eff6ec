"""What the fused kernels compute again, and that they leave the rest alone.

They never look at results, so a wrong result cannot show it. The tables do: the cube reads runs alone, the repair reads
`starts` and `groups` as well. Here these are such that a result is right where the cube made it, and another where it
was computed again.
"""

import pytest
import torch
from cases import Case
from machines import A2
from tolerance import assert_close

from nsa.ascend.simulator import simulator_driver
from nsa.kernels import fused
from nsa.table import RowGroup, WindowTable

# Windows 0 to 66, then window 67 of 40 rows. Items have two heads, and all runs for one program, for three a third.
CASE = Case((1100, 40), 32, 16, 4, 128)
TABLE = WindowTable(CASE.actual_seq_len, *CASE.geometry, torch.device("cpu"))
SIZES = (*CASE.geometry, CASE.n, CASE.d)
ZEROS = torch.zeros(CASE.n, CASE.d)


def spoilt(tensor, where):
    tensor = tensor.clone()
    if where is not None:
        tensor[where] = torch.inf
    return tensor


def check(computed, which, again, exact, magnitude):
    """Rows and heads `again` are as `exact`, all others as the case has them."""
    rows, heads = (slice(*again[:2]), slice(*again[2:])) if again else (slice(0), slice(0))
    expected = CASE.exact[which].clone(), CASE.magnitude[which].clone()
    for whole, other in zip(expected, (exact, magnitude)):
        whole[rows, heads] = other[heads]
    assert_close(computed, *expected, CASE.terms[which])


# Runs of 16 windows, which load 272 rows: rows 0 to 271, 256 to 527, and so on; the repair has columns of one head. The
# run of windows 64 to 66 loads all from row 1024 on, also the second segment, whose run is window 67.
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize(
    ("where", "again"),
    [
        (None, None),
        ((255, 1, 127), (0, 16, 1, 2)),
        ((256, 1, 0), (0, 32, 1, 2)),
        ((271, 0, 5), (0, 32, 0, 1)),
        ((272, 2, 5), (16, 32, 2, 3)),
        ((1139, 3, 5), (64, 68, 3, 4)),  # in no window
    ],
)
def test_forward_computes_runs_again_that_loaded_what_is_not_finite(guarded, where, again, programs):
    """All windows begin in row 304, by `starts`: so do those that are computed again."""
    x, weight = spoilt(CASE.inputs[0], where), CASE.inputs[1]
    tile = A2.forward_tile(*SIZES)
    starts = torch.full_like(TABLE.starts, 304)
    assert (tile.windows, tile.heads) == (16, 2)
    y = fused.forward(x, weight, starts, TABLE.window_runs(tile.windows), tile, CASE.stride, programs)
    check(y, 0, again, CASE.exact[0][19], CASE.magnitude[0][19])  # window 19 does


# Runs of 112 rows, which load 8 windows: rows 224 to 335 windows 13 to 20, rows 336 to 447 windows 20 to 27; the repair
# has columns of both heads.
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize(
    ("where", "again"),
    [
        (None, None),
        ((19, 1, 127), (224, 336, 0, 2)),
        ((20, 2, 0), (224, 448, 2, 4)),
        ((21, 3, 5), (336, 448, 2, 4)),
        ((66, 0, 5), (1008, 1100, 0, 2)),  # the last of its segment; window 67 is in a slot of that run, and masked
        ((67, 0, 5), (1100, 1140, 0, 2)),
    ],
)
def test_grad_input_computes_runs_again_that_loaded_what_is_not_finite(guarded, where, again, programs):
    """No window holds a row, by `groups`: so rows that are computed again are 0."""
    dy, weight = spoilt(CASE.inputs[2], where), CASE.inputs[1]
    check(grad_input(dy, weight, programs), 1, again, ZEROS, ZEROS)


@pytest.mark.parametrize(("tap", "head"), [(0, 0), (15, 1), (16, 2), (31, 3)])
def test_grad_input_computes_all_runs_again_of_heads_whose_weights_are_not_finite(guarded, tap, head):
    first = head // 2 * 2
    dx = grad_input(CASE.inputs[2], spoilt(CASE.inputs[1], (tap, head)), programs=3)
    check(dx, 1, (0, 1140, first, first + 2), ZEROS, ZEROS)


def grad_input(dy, weight, programs):
    tile = A2.grad_input_tile(*SIZES)
    groups = RowGroup(*TABLE.groups.T)
    groups = torch.stack(groups._replace(end=groups.first), 1)
    assert (tile.rows, tile.heads) == (112, 2)
    return fused.grad_input(dy, weight, groups, TABLE.row_runs(tile.rows), tile, CASE.stride, TABLE.n_rows, programs)


@pytest.mark.parametrize("value", [1, torch.nan])
def test_vector_cores_read_inputs_only_if_something_is_not_finite(value):
    case = Case((100,), 32, 16, 2, 16)
    x, weight, dy = (tensor.clone() for tensor in case.inputs)
    x[40, 1, 3] = dy[2, 1, 3] = value
    table, sizes = WindowTable(case.actual_seq_len, *case.geometry, torch.device("cpu")), (*case.geometry, 2, 16)
    with simulator_driver("Ascend910B3", check=False) as log:
        tile = A2.forward_tile(*sizes)
        fused.forward(x, weight, table.starts, table.window_runs(tile.windows), tile, case.stride, 1)
        tile = A2.grad_input_tile(*sizes)
        fused.grad_input(dy, weight, table.groups, table.row_runs(tile.rows), tile, case.stride, table.n_rows, 1)
    for launch, name in zip(log, ("x", "dy"), strict=True):
        readers = {
            trace.core_type for trace in launch.run.traces for op in trace.ran for view in op.reads
            if view.memory.name == name
        }  # fmt: skip
        assert readers == ({"AIC"} if value == 1 else {"AIC", "AIV"})
