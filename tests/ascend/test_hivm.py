"""What is read off a module, on one written by hand as the A5 tools write theirs."""

import pytest
from xdsl.parser import Parser

from nsa.ascend import hivm
from nsa.ascend.compile import compile_kernel
from nsa.ascend.launches import Shape, launches_of
from nsa.ascend.targets import find_target

GM, UB = "#hivm.address_space<gm>", "#hivm.address_space<ub>"
SIZES = "operandSegmentSizes = array<i32: 1, 0, 1, 0>, static_offsets = array<i64: 0>, static_strides = array<i64: 1>"
ANY = -9223372036854775808


def module(*lines):
    """A kernel of x and n, with constants, an index %i that is none, and buffers on chip and of its own."""
    text = "\n".join(lines)
    return hivm.parse(f"""
"builtin.module"() ({{
"func.func"() <{{sym_name = "kernel"}}> ({{
^bb0(%0: i64, %1: i64, %2: i64, %x: memref<?xf32, {GM}>, %n: i64):
%zero = "llvm.mlir.constant"() <{{value = 0 : index}}> : () -> i64
%four = "llvm.mlir.constant"() <{{value = 4 : index}}> : () -> i64
%c4 = "builtin.unrealized_conversion_cast"(%four) : (i64) -> index
%i = "builtin.unrealized_conversion_cast"(%n) : (i64) -> index
%ub = "hivm.hir.pointer_cast"(%four) <{{operandSegmentSizes = array<i32: 1, 0>}}> : (i64) -> memref<8xf32, {UB}>
%own = "memref.alloca"() : () -> memref<8xf32>
{text}
"func.return"() : () -> ()
}}) {{hacc.entry}} : () -> ()
}}) : () -> ()""")


def masked(sizes):
    """A load of the block whose masked size is %rows."""
    return (
        f'%part = "memref.reinterpret_cast"(%x, %rows) <{{{SIZES}, static_sizes = array<i64: {sizes}>}}> '
        f": (memref<?xf32, {GM}>, index) -> memref<?xf32, {GM}>",
        f'"func.call"(%part, %ub) <{{callee = @load_gm_to_ubuf}}> : (memref<?xf32, {GM}>, memref<8xf32, {UB}>) -> ()',
    )


AT_LEAST_0 = '%low = "llvm.intr.smax"(%n, %zero) : (i64, i64) -> i64'
AT_MOST_4 = '%both = "llvm.intr.smin"(%low, %four) : (i64, i64) -> i64'
AS_INDEX = '%k = "builtin.unrealized_conversion_cast"(%both) : (i64) -> index'


def test_a_mask_bounds_a_block():
    """0 to 4 rows; 4 of them times 4; 4 less 0 to 4."""
    for line, sizes, n_bytes in (
        ('%rows = "builtin.unrealized_conversion_cast"(%both) : (i64) -> index', f"{ANY}, 8", 4 * 8 * 4),
        ('%rows = "arith.muli"(%k, %c4) : (index, index) -> index', f"{ANY}", 16 * 4),
        (
            """%minus = "arith.constant"() <{value = -1 : index}> : () -> index
            %less = "arith.muli"(%k, %minus) : (index, index) -> index
            %rows = "arith.addi"(%c4, %less) : (index, index) -> index""",
            f"{ANY}",
            4 * 4,
        ),
    ):
        lines = [part.strip() for part in line.splitlines()]
        (transfer,) = hivm.transfers_of(module(AT_LEAST_0, AT_MOST_4, AS_INDEX, *lines, *masked(sizes)))
        assert (transfer["argument"], transfer["bytes"], transfer["depth"]) == (0, n_bytes, 0)


def test_a_block_without_a_bound_is_an_error():
    """0 times anything is 0; twice anything is not known."""
    for factor, bound in (("%zero", 0), ("%four", None)):
        made = module(
            f'%f = "builtin.unrealized_conversion_cast"({factor}) : (i64) -> index',
            '%rows = "arith.muli"(%i, %f) : (index, index) -> index',
            *masked(f"{ANY}"),
        )
        if bound is None:
            with pytest.raises(ValueError, match=r"expected sizes that are known, or that a mask bounds, got \[inf\]"):
                hivm.transfers_of(made)
        else:
            assert hivm.transfers_of(made)[0]["bytes"] == bound


def test_which_accesses_are_scalar():
    """Those of on-chip buffers at an index that varies: two of these six."""
    facts = hivm.facts_of(
        module(
            f'%a = "memref.load"(%ub, %i) : (memref<8xf32, {UB}>, index) -> f32',
            f'%b = "memref.load"(%ub, %c4) : (memref<8xf32, {UB}>, index) -> f32',
            f'%c = "memref.load"(%x, %i) : (memref<?xf32, {GM}>, index) -> f32',
            f'"memref.store"(%a, %ub, %i) : (f32, memref<8xf32, {UB}>, index) -> ()',
            f'"memref.store"(%a, %ub, %c4) : (f32, memref<8xf32, {UB}>, index) -> ()',
            '"memref.store"(%a, %own, %i) : (f32, memref<8xf32>, index) -> ()',
        ),
        [],
    )
    assert facts["scalar_accesses"] == 2
    assert facts["memory"] == {"UB": 4 + 8 * 4}
    assert (facts["core"], facts["calls"], facts["multi_buffered"]) == ("mix", {}, False)


def test_a_choice_of_numbers_is_no_double_buffer():
    for name, type_, alternates in (
        ("arith.select", "i64", False),
        ("llvm.select", "i64", False),
        ("arith.select", f"memref<8xf32, {UB}>", True),
    ):
        value = "%ub" if alternates else "%n"
        choice = f'%s = "{name}"(%t, {value}, {value}) : (i1, {type_}, {type_}) -> {type_}'
        made = module('%t = "llvm.trunc"(%n) : (i64) -> i1', choice)
        assert hivm.facts_of(made, [])["multi_buffered"] is alternates


@pytest.mark.parametrize("target", ["Ascend910B3", "Ascend950PR_9589"])
def test_what_was_parsed_before_is_taken_for_nothing_else(target):
    """The parser remembers how lines end. Texts for A5 give names to maps, each its own."""
    target = find_target(target)
    launches = launches_of(Shape(32, 16, 8, 128, "bf16"), target)[-2:]
    for launch in launches:
        generic = compile_kernel(launch.kernel, launch.signature, launch.constants, target).generic
        plain = Parser(hivm._context(), generic).parse_module()
        assert hivm.parse(generic).op.is_structurally_equivalent(plain)
