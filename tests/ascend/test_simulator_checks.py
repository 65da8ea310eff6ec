"""Each check of the simulator catches what it is for: good modules, broken in one place, and unbroken ones for control.

A module is the generic text that the compiler makes of a kernel. `Text` breaks it; lines keep their numbers where it
only takes some away. A fault has to name the check and the lines of both instructions.

What the compiler itself gets wrong is in test_simulator_found.py.
"""

import re
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from nsa.ascend import compile as pipeline
from nsa.ascend import find_target
from nsa.ascend.hivm import parse
from nsa.ascend.simulator import checks
from nsa.ascend.simulator.machine import programs_of
from nsa.ascend.simulator.memory import Memory, View
from nsa.ascend.simulator.run import run
from nsa.kernels.cube import band_matrix, forward_cube_kernel
from nsa.table import WindowTable

A2 = "Ascend910B3"
BLOCK, STRIDE, WINDOWS, M, K, N, D = 32, 16, 3, 16, 64, 2, 32
# what stands in the lines of the forward kernel
BAND_LOAD, LOAD, CLEAR, PRODUCT, STORE = (
    ("@nd2nz_", 0), ("@nd2nz_", 1), ("@set_l1_2d_", 0), ("@mma_tile_", 0), ("@fixpipe_", 0)
)  # fmt: skip


class Text:
    """Lines of a module, which the methods break."""

    def __init__(self, text):
        self.lines = text.splitlines()

    def find(self, *words, n=0):
        """The index of the n-th line that has all the words, declarations left out."""
        found = [i for i, line in enumerate(self.lines) if all(w in line for w in words) and "sym_name" not in line]
        assert len(found) > n, words
        return found[n]

    def number(self, words):
        """The number of the line of an instruction, as messages have it."""
        return self.find(f"callee = {words[0]}", n=words[1]) + 1

    def flag(self, kind, setting, waiting, n=0):
        pipes = (f"{which}_pipe = #hivm.pipe<PIPE_{pipe}>" for which, pipe in (("set", setting), ("wait", waiting)))
        return self.find(f"hir.{kind}_flag", *pipes, n=n)

    def drop(self, *indices):
        for i in indices:
            self.lines[i] = ""

    def replace(self, old, new, *words, n=0):
        """In the n-th line with `old` and the words."""
        i = self.find(old, *words, n=n)
        self.lines[i] = self.lines[i].replace(old, new, 1)

    def everywhere(self, old, new):
        assert any(old in line for line in self.lines)
        self.lines = [line.replace(old, new) for line in self.lines]

    def move(self, i, before):
        self.lines.insert(before, self.lines.pop(i))

    def repeat(self, i):
        self.lines.insert(i, self.lines[i])

    def result(self, *words, n=0):
        """The SSA value of the n-th line that has the words."""
        return self.lines[self.find(*words, n=n)].split(" = ")[0].strip()

    def constant(self, value):
        return self.result(f"<{{value = {value}}}>")


class Outcome(NamedTuple):
    faults: list
    text: Text

    @property
    def checks(self):
        return {fault.check for fault in self.faults}

    def names(self, check, *instructions):
        """Whether one fault of that check has the lines of all the instructions."""
        wanted = set(map(self.text.number, instructions))
        return any(
            fault.check == check and {int(n) for n in re.findall(r"line (\d+)", fault.message)} == wanted
            for fault in self.faults
        )


def compiled(kernel, signature, constants=None):
    return Text(pipeline.compile_kernel(kernel, signature, constants or {}, find_target(A2)).generic)


def execute(text, values, programs=1):
    done = run(programs_of(parse("\n".join(text.lines) + "\n")), values, (programs, 1, 1))
    return Outcome([*done.faults, *checks.check(done)], text)


def randn(*sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


class Forward:
    """The forward kernel of two heads on a segment, in runs of 3 windows."""

    def __init__(self, windows=12, splits=1, programs=1):
        signature = {"x": "*bf16", "band": "*bf16", "runs": "*i64", "y": "*bf16"}
        signature |= {"n_runs": "i32", "n_splits": "i32", "n_programs": "i32"}
        self.text = compiled(forward_cube_kernel, signature, {"N": N, "D": D, "M": M, "K": K, "KC": K, "BD": D})
        self.x = randn((windows - 1) * STRIDE + BLOCK, N, D).bfloat16()
        table = WindowTable([len(self.x)], BLOCK, STRIDE, torch.device("cpu"))
        self.weight, self.runs = randn(BLOCK, N).bfloat16(), table.window_runs(WINDOWS)
        self.y = torch.zeros(windows, N, D).bfloat16()
        self.splits, self.programs = splits, programs

    def execute(self):
        band = band_matrix(self.weight, STRIDE, WINDOWS, M, K)
        values = [self.x, band, self.runs, self.y, len(self.runs), self.splits, self.programs]
        return execute(self.text, values, self.programs)

    def is_right(self):
        windows = self.x.unfold(0, BLOCK, STRIDE).float()  # [w, n, d, j]
        exact = torch.einsum("wndj,jn->wnd", windows, self.weight.float())
        return torch.allclose(self.y.float(), exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(("windows", "splits", "programs"), [(12, 1, 1), (9, 1, 1), (11, 2, 1), (12, 2, 4)])
def test_the_forward_kernel_is_right_before_it_is_broken(windows, splits, programs):
    forward = Forward(windows, splits, programs)
    assert forward.execute().faults == []
    assert forward.is_right()


# flags


def test_a_wait_and_its_set_dropped():
    forward = Forward()
    forward.text.drop(forward.text.flag("wait", "M", "FIX"), forward.text.flag("set", "M", "FIX"))
    outcome = forward.execute()
    assert outcome.checks == {"race on chip"}
    assert outcome.names("race on chip", PRODUCT, STORE)


def test_a_wait_dropped_leaves_its_flag_set_twice():
    forward = Forward()
    dropped = forward.text.flag("wait", "M", "FIX")
    set_ = forward.text.flag("set", "M", "FIX")
    forward.text.drop(dropped)
    outcome = forward.execute()
    (fault,) = [fault for fault in outcome.faults if fault.check == "flag set twice"]
    assert fault.message.count(f"line {set_ + 1}") == 2


def test_a_flag_set_twice():
    forward = Forward()
    forward.text.repeat(i := forward.text.flag("set", "M", "FIX"))
    outcome = forward.execute()
    (fault,) = outcome.faults
    assert fault.check == "flag set twice"
    assert f"line {i + 1} and" in fault.message
    assert f"line {i + 2}," in fault.message


def test_a_flag_left_set():
    forward = Forward()
    forward.text.drop(forward.text.flag("wait", "FIX", "M", n=1))
    (fault,) = forward.execute().faults
    assert fault.check == "flag left set"
    assert f"line {forward.text.flag('set', 'FIX', 'M', n=1) + 1}" in fault.message


def test_a_set_dropped_is_a_deadlock():
    forward = Forward()
    forward.text.drop(forward.text.flag("set", "M", "FIX"))
    outcome = forward.execute()
    (fault,) = [fault for fault in outcome.faults if fault.check == "deadlock"]
    assert "FIX waits for ever" in fault.message
    assert f"line {forward.text.flag('wait', 'M', 'FIX') + 1}" in fault.message


def test_a_set_moved_before_its_use_has_ended():
    forward = Forward()
    forward.text.move(forward.text.flag("set", "FIX", "M", n=1), before=forward.text.number(STORE) - 1)
    outcome = forward.execute()
    assert outcome.checks == {"race on chip"}
    assert outcome.names("race on chip", PRODUCT, STORE)


def test_a_wait_moved_behind_its_instruction():
    forward = Forward()
    forward.text.move(forward.text.flag("wait", "M", "FIX"), before=forward.text.number(STORE) - 1)
    outcome = forward.execute()
    assert outcome.checks == {"race on chip"}
    assert outcome.names("race on chip", PRODUCT, STORE)


def test_a_pair_of_lines_is_reported_once():
    """Without flags between them, each product meets the store before it, and each store the product before it."""
    forward = Forward()
    pipes = "PIPE_M>", "PIPE_FIX>"
    flags = [i for i, line in enumerate(forward.text.lines) if "_flag" in line and all(pipe in line for pipe in pipes)]
    forward.text.drop(*flags)
    outcome = forward.execute()
    (fault,) = outcome.faults
    assert outcome.names("race on chip", PRODUCT, STORE)
    assert re.search(r" \(\d+ times\)$", fault.message)


def count_of_trips(text, before):
    """The index of the line that counts all trips, of which the parity decides what is selected in line `before`, and
    the SSA value that counts those of the inner loop alone."""
    i = [i for i, line in enumerate(text.lines[:before]) if "arith.addi" in line][-2]
    return i, text.lines[i].split('"(')[1].split(", ")[0]


@pytest.mark.parametrize(("windows", "is_odd"), [(9, True), (12, False)])
def test_buffers_that_take_turns_wrongly_after_an_odd_number_of_trips(windows, is_odd):
    """The two buffers of x take turns with the trips of the inner loop, their flags with all trips."""
    forward = Forward(windows)
    i, inner = count_of_trips(forward.text, forward.text.find("arith.select", "memref<2x4x16x16xbf16"))
    result = forward.text.lines[i].split(" = ")[0]
    forward.text.lines[i] = f'{result} = "arith.maxsi"({inner}, {inner}) : (index, index) -> index'
    outcome = forward.execute()
    assert outcome.checks == ({"race on chip"} if is_odd else set())
    assert not is_odd or outcome.names("race on chip", LOAD, PRODUCT)


@pytest.mark.parametrize(("windows", "is_odd"), [(9, True), (12, False)])
def test_releases_that_take_turns_wrongly_after_an_odd_number_of_trips(windows, is_odd):
    """What gives the buffers of x back takes turns with the trips of the inner loop, what waits with all trips."""
    forward = Forward(windows)
    i = forward.text.find("arith.select", "(i1, i64, i64) -> i64")
    event, rest = forward.text.lines[i].strip().split(" = ")
    _, inner = count_of_trips(forward.text, i)
    operands = rest.split('"(')[1].split(")")[0].split(", ")
    forward.text.lines[i + 1 : i + 1] = [
        f'%900 = "arith.index_cast"({inner}) : (index) -> i1',
        f"%901 = {rest.replace(operands[0], '%900')}",
    ]
    forward.text.replace(f", {event}, ", ", %901, ", "callee = @mma_tile_")
    outcome = forward.execute()
    assert outcome.checks == ({"flag set twice"} if is_odd else set())
    assert not is_odd or outcome.names("flag set twice", PRODUCT)


# addresses on chip


def test_the_two_buffers_of_a_pair_made_one():
    forward = Forward()
    first, second = (forward.text.find("pointer_cast", "memref<2x4x16x16xbf16", n=n) for n in (0, 1))
    operands = [forward.text.lines[i].split('"(')[1].split(")")[0] for i in (first, second)]
    forward.text.lines[second] = forward.text.lines[second].replace(operands[1], operands[0])
    outcome = forward.execute()
    assert outcome.checks == {"race on chip"}
    assert outcome.names("race on chip", LOAD, PRODUCT)


def test_an_address_on_chip_shifted_by_one_row():
    forward = Forward()
    forward.text.replace("value = 2048 : i64", "value = 2016 : i64")
    outcome = forward.execute()
    assert outcome.checks == {"race on chip"}
    assert outcome.names("race on chip", BAND_LOAD, LOAD)
    assert any("bytes 2016 to 2047 of L1" in fault.message for fault in outcome.faults)


def test_an_address_that_is_not_aligned():
    forward = Forward()
    forward.text.replace("value = 2048 : i64", "value = 2064 : i64")
    (fault,) = forward.execute().faults
    assert fault.check == "alignment"
    assert f"line {forward.text.number(LOAD)}, demands an address in L1 at a multiple of 32" in fault.message


def test_a_pipe_barrier_dropped():
    forward = Forward(windows=11)  # the last run has two windows, so that the buffer is cleared
    forward.text.drop(forward.text.find("pipe_barrier", "PIPE_MTE2"))
    outcome = forward.execute()
    assert outcome.checks == {"race on chip"}
    assert outcome.names("race on chip", CLEAR, LOAD)


def test_the_left_operand_overwritten_while_it_is_still_used():
    """The band is given back before the loop that multiplies with it; the third item's comes into the same buffer."""
    forward = Forward(windows=6, splits=2)  # items of one run: with more, flags of x keep the order
    forward.text.move(forward.text.flag("set", "MTE1", "MTE2", n=5), before=forward.text.find("scf.for", n=1))
    outcome = forward.execute()
    assert outcome.checks == {"race on chip"}
    assert outcome.names("race on chip", BAND_LOAD, PRODUCT)


def test_sums_that_were_never_written():
    forward = Forward()
    yes, no = forward.text.constant("true"), forward.text.constant("false")
    forward.text.replace(f", {yes}, ", f", {no}, ", "callee = @mma_tile_")
    outcome = forward.execute()
    assert outcome.checks == {"never written"}
    assert outcome.names("never written", PRODUCT)


def test_operands_too_large_for_l0():
    forward = Forward()
    forward.text.everywhere("memref<2x4x16x16xbf16", "memref<260x4x16x16xbf16")
    (fault,) = forward.execute().faults
    assert fault.check == "access outside"
    assert f"line {forward.text.number(PRODUCT)}, has operands of which not even 16 columns fit" in fault.message


def test_sums_past_the_end_of_l0c():
    forward = Forward()
    i = forward.text.find("pointer_cast", "address_space<cc>")
    address = forward.text.lines[i].split('"(')[1].split(")")[0]
    forward.text.lines[i] = forward.text.lines[i].replace(f"({address})", "(%900)", 1)
    forward.text.lines.insert(i, '%900 = "arith.constant"() <{value = 130048 : i64}> : () -> i64')
    (fault,) = forward.execute().faults
    assert fault.check == "access outside"
    assert f"mma_tile_bfloat16_t_to_float on M, line {forward.text.number(PRODUCT)}" in fault.message
    assert "bytes 130048 to 132095 of L0C, which has 131072" in fault.message


def test_an_unknown_intrinsic():
    forward = Forward()
    line = forward.text.number(LOAD)
    forward.text.replace("@nd2nz_", "@nd2zz_", n=1)
    (fault,) = forward.execute().faults
    assert fault.check == "unknown intrinsic"
    assert f"nd2zz_bfloat16_t, called in line {line}" in fault.message


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a, b_b = tl.load(a + o_m[:, None] * K + o_k[None, :]), tl.load(b + o_k[:, None] * N + o_n[None, :])
    tl.store(c + o_m[:, None] * N + o_n[None, :], tl.maximum(tl.dot(b_a, b_b), 0))


def test_the_cube_adds_up_parts_in_their_order():
    """Four parts of 16 blocks, between which the library puts no barrier; and a ReLU by the vector cores."""
    a, b, c = randn(16, 256).bfloat16(), randn(256, 256).bfloat16(), torch.zeros(16, 256)
    constants = {"M": 16, "N": 256, "K": 256}
    assert execute(compiled(product, {"a": "*bf16", "b": "*bf16", "c": "*fp32"}, constants), [a, b, c]).faults == []
    assert torch.allclose(c, (a.float() @ b.float()).relu(), atol=1e-3)


# memory


def test_an_address_in_memory_shifted_by_one_row():
    """A wrong result; and at the end of the tensor an access outside of it."""
    forward = Forward()
    row = forward.text.result("memref.load", "-> i64")
    forward.text.replace(f"({row}, ", "(%900, ", "arith.muli")
    one = forward.text.constant("1 : i64")
    forward.text.lines.insert(
        forward.text.find("memref.load") + 1, f'%900 = "arith.addi"({row}, {one}) : (i64, i64) -> i64'
    )
    outcome = forward.execute()
    assert outcome.checks == {"access outside"}
    forward.x = torch.cat([forward.x, forward.x[:1]])
    assert forward.execute().faults == []
    assert not forward.is_right()


def test_a_masked_row_read_all_the_same():
    forward = Forward(windows=11)
    forward.x = forward.x[:-1]
    (fault,) = forward.execute().faults
    assert fault.check == "access outside"
    assert f"line {forward.text.number(LOAD)}" in fault.message
    assert "argument 0" in fault.message


@pytest.mark.parametrize("same", [True, False])
def test_two_blocks_that_write_one_place(same):
    """Every run writes the first windows: the same bits where x repeats itself, which needs no order."""
    forward = Forward(splits=4, programs=8)
    window = forward.text.result("memref.load", "-> i64", n=2)
    forward.text.replace(f"({window}, ", f"({forward.text.constant('0 : i64')}, ", "arith.muli")
    if same:
        forward.x[:] = 1
    outcome = forward.execute()
    assert outcome.checks == (set() if same else {"race between blocks"})
    assert same or outcome.names("race between blocks", STORE)


@triton.jit
def there_and_back(x, y, z):
    o = tl.arange(0, 64)
    tl.store(y + o, tl.load(x + o) * 2)
    tl.store(z + o, tl.load(y + o) + 1)


@pytest.mark.parametrize("broken", [False, True])
def test_a_store_and_a_load_of_one_address(broken):
    text = compiled(there_and_back, {"x": "*fp32", "y": "*fp32", "z": "*fp32"})
    if broken:
        text.drop(text.flag("set", "MTE3", "MTE2"), text.flag("wait", "MTE3", "MTE2"))
    x, y, z = randn(64), torch.zeros(64), torch.zeros(64)
    outcome = execute(text, [x, y, z])
    assert outcome.checks == ({"race in memory"} if broken else set())
    if broken:
        assert outcome.names("race in memory", ("@store_ubuf_to_gm_1d", 0), ("@load_gm_to_ubuf_1d", 1))
    else:
        assert torch.equal(z, x * 2 + 1)


@triton.jit
def doubled_and_one(x, y):
    o = tl.arange(0, 64)
    tl.store(y + o, tl.load(x + o) * 2 + 1)


@pytest.mark.parametrize("broken", [False, True])
def test_a_barrier_of_the_vector_unit_dropped(broken):
    text = compiled(doubled_and_one, {"x": "*fp32", "y": "*fp32"})
    if broken:
        text.drop(text.find("pipe_barrier", "PIPE_V"))
    outcome = execute(text, [randn(64), torch.zeros(64)])
    assert outcome.checks == ({"race on chip"} if broken else set())
    assert not broken or outcome.names("race on chip", ("@vmuls_vs_", 0), ("@vadds_vs_", 0))


@triton.jit
def first_of_stored(x, y, z):
    o = tl.arange(0, 64)
    tl.store(y + o, tl.load(x + o))
    tl.store(z, tl.load(y) + 1)


@pytest.mark.parametrize("broken", [False, True])
def test_a_store_and_a_load_by_the_scalar_unit(broken):
    text = compiled(first_of_stored, {"x": "*i32", "y": "*i32", "z": "*i32"})
    if broken:
        text.drop(text.flag("set", "MTE3", "S"), text.flag("wait", "MTE3", "S"))
    outcome = execute(text, [torch.arange(64).int(), torch.zeros(64).int(), torch.zeros(1).int()])
    assert outcome.checks == ({"race in memory"} if broken else set())
    if broken:
        lines = text.number(("@store_ubuf_to_gm_1d", 0)), text.find("memref.load") + 1
        assert all(f"line {line}" in outcome.faults[0].message for line in lines)


@triton.jit
def plus_one(x, y, n):
    o = tl.arange(0, 64)
    for i in range(n):
        tl.store(y + i * 64 + o, tl.load(x + i * 64 + o) + 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_arguments_that_overlap(overlap):
    """The compiler takes tensors that it is given as two arguments for two."""
    text = compiled(plus_one, {"x": "*fp32", "y": "*fp32", "n": "i32"})
    data = torch.zeros(512)
    outcome = execute(text, [data[:256], data[64:320] if overlap else data[256:], 4])
    assert outcome.checks == ({"race in memory"} if overlap else set())
    assert not overlap or outcome.names("race in memory", ("@load_gm_to_ubuf_1d", 0), ("@store_ubuf_to_gm_1d", 0))


@triton.jit
def plus_the_next(x):
    o = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(x + o, tl.load(x + o) + tl.load(x + o + 1))


@pytest.mark.parametrize("programs", [1, 2])
def test_a_block_that_writes_what_both_it_and_another_read(programs):
    outcome = execute(compiled(plus_the_next, {"x": "*fp32"}), [randn(129)], programs)
    assert outcome.checks == (set() if programs == 1 else {"race between blocks"})
    if programs == 2:
        (fault,) = outcome.faults
        assert outcome.names("race between blocks", ("@load_gm_to_ubuf_1d", 1), ("@store_ubuf_to_gm_1d", 0))
        assert "bytes 256 to 259" in fault.message


@triton.jit
def cleared_and_set(x, writer):
    o = tl.arange(0, 64)
    tl.store(x + o, tl.zeros([64], tl.float32))
    if tl.program_id(0) == writer:
        tl.store(x + o, tl.zeros([64], tl.float32) + 1)


@pytest.mark.parametrize("writer", [0, 1, 2])
def test_writes_of_the_same_bits_hide_no_other_write(writer):
    """Program 1 clears what program 0 has cleared already. No program 2 is there to set it."""
    outcome = execute(compiled(cleared_and_set, {"x": "*fp32", "writer": "i32"}), [torch.ones(64), writer], 2)
    assert outcome.checks == (set() if writer == 2 else {"race between blocks"})


# the two halves of a mix kernel


@triton.jit
def through_memory(a, scratch, x, c):
    """c = 2 a @ x, where the vector cores fill the scratch with 2 a, each half of the rows."""
    o_16, o_32 = tl.arange(0, 16), tl.arange(0, 32)
    p_scratch = scratch + o_16[:, None] * 32 + o_32[None, :]
    tl.store(p_scratch, tl.load(a + o_16[:, None] * 32 + o_32[None, :]) * 2)
    b = tl.dot(tl.load(p_scratch), tl.load(x + o_32[:, None] * 32 + o_32[None, :]))
    tl.store(c + o_16[:, None] * 32 + o_32[None, :], b)


class Mix:
    def __init__(self):
        self.text = compiled(through_memory, {"a": "*bf16", "scratch": "*bf16", "x": "*bf16", "c": "*fp32"})
        self.a, self.x, self.c = randn(16, 32).bfloat16(), randn(32, 32).bfloat16(), torch.zeros(16, 32)

    def execute(self):
        return execute(self.text, [self.a, torch.zeros_like(self.a), self.x, self.c])


def test_a_mix_kernel_is_right_before_it_is_broken():
    mix = Mix()
    assert mix.execute().faults == []
    assert torch.allclose(mix.c, 2 * mix.a.float() @ mix.x.float(), atol=1e-3)


def test_a_cube_core_that_does_not_wait_for_the_vector_cores():
    mix = Mix()
    mix.text.drop(mix.text.find("sync_block_set"), mix.text.find("sync_block_wait"))
    outcome = mix.execute()
    assert outcome.checks == {"race in memory"}
    assert outcome.names("race in memory", ("@nd2nz_", 0), ("@store_ubuf_to_gm_", 0))


def test_a_set_between_cores_dropped_is_a_deadlock():
    mix = Mix()
    mix.text.drop(mix.text.find("sync_block_set"))
    (fault,) = mix.execute().faults
    assert fault.check == "deadlock"
    assert "AIC" in fault.message
    assert f"line {mix.text.find('sync_block_wait') + 1}" in fault.message


def test_a_flag_between_cores_left_set():
    mix = Mix()
    mix.text.drop(mix.text.find("sync_block_wait"))
    outcome = mix.execute()
    assert "flag left set" in outcome.checks


@triton.jit
def sum_in_memory(a, b, c, n):
    o = tl.arange(0, 32)
    p = o[:, None] * 32 + o[None, :]
    for i in range(n):
        tl.store(c + p, tl.load(c + p) + tl.dot(tl.load(a + p), tl.load(b + i * 1024 + p)))


@pytest.mark.parametrize("marked", [True, False])
def test_what_a_vector_core_reads_that_never_stores(marked):
    """The second one loads what the first one stores, and the compiler has left all stores to the first."""
    text = compiled(sum_in_memory, {"a": "*bf16", "b": "*bf16", "c": "*fp32", "n": "i32"})
    if not marked:
        text.everywhere("limit_sub_block_id0", "limit")
    a, b, c = randn(32, 32).bfloat16(), randn(3, 32, 32).bfloat16(), torch.zeros(32, 32)
    outcome = execute(text, [a, b, c, 3])
    assert outcome.checks == (set() if marked else {"race in memory"})
    assert torch.allclose(c, a.float() @ b.float().sum(0), atol=1e-4)


@pytest.mark.parametrize("same", [True, False])
def test_two_vector_cores_that_write_one_place(same):
    """Both write the first half of the scratch, each its own rows: the same bits where all rows are equal."""
    mix = Mix()
    half = mix.text.find("memref.subview", "static_sizes = array<i64: 8, 32>")
    source, row = mix.text.lines[half].split('"(')[1].split(")")[0].split(", ")
    mix.text.replace(f"({source}, {row})", f"({source}, %900)", "memref.subview")
    mix.text.lines.insert(half, '%900 = "arith.constant"() <{value = 0 : index}> : () -> index')
    if same:
        mix.a[:] = mix.a[0]
    outcome = mix.execute()
    assert outcome.checks == (set() if same else {"race in memory"})
    assert same or outcome.names("race in memory", ("@store_ubuf_to_gm_", 0))


# results


@triton.jit
def middle_sums(x, y):
    o = tl.arange(0, 8)
    b = tl.sum(tl.load(x + o[:, None, None] * 64 + o[None, :, None] * 8 + o[None, None, :]), 1)
    tl.store(y + o[:, None] * 8 + o[None, :], b)


@pytest.mark.parametrize("broken", [False, True])
def test_a_sum_along_the_wrong_axis(broken):
    text = compiled(middle_sums, {"x": "*fp32", "y": "*fp32"})
    if broken:  # the first axis: the sizes of x are seen in another order
        text.everywhere("memref<8x1x8xf32", "memref<1x8x8xf32")
        text.everywhere("reduce_sum_ara_float", "reduce_sum_ra0a1_float")
    x, y = randn(8, 8, 8), torch.zeros(8, 8)
    outcome = execute(text, [x, y])
    assert outcome.faults == []
    assert torch.allclose(y, x.sum(1), atol=1e-5) != broken


def test_shadows_take_no_memory_for_what_nobody_touches():
    """Of a tensor of 2 GiB: four arrays of 4 GiB each, of which a line is touched. Two tests at a time, of tensors past
    2^31 elements, have run out of memory."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    shadow = checks._Shadow(2**31, 2)
    view = View(Memory("GM", np.zeros(2**31, np.uint8)), np.dtype(np.float16), 2**31 - 64, 0, (32,), (1,))
    for pipe in ("MTE2", "MTE3"):
        shadow.note(view, pipe, 7, write=True)
    assert shadow.written[-32:].tolist() == [7] * 32
    assert resident() - before < 2**26
