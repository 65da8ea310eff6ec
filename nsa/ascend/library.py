"""What lowered kernels call from the library of the Ascend compiler, written out in MLIR for the host.

triton-ascend lowers some operations to calls of functions that have no body in the Linalg text. For example
`tl.flip(b, 0)` on 64 elements becomes

    %1 = call @triton_flip(%0, %c0_i64) : (tensor<64xf32>, i64) -> tensor<64xf32>
    func.func private @triton_flip(tensor<64xf32>, i64) -> tensor<64xf32>

`with_bodies` replaces the second line by a definition for these very types. What a vendor's function does beside the
documented meaning of the Triton operation (its rounding, where it puts a NaN) is not known here: the definitions
follow Triton's documentation and PyTorch.
"""

import re

_DECLARATION = re.compile(r"^ *func\.func private @(\w+)\(([^)]*)\)(?: -> ([^\s{]+))?.*$", re.MULTILINE)

# Of one number %0 of type T, for libdevice.
_NUMBERS = {
    "__hmf_recip": "%one = arith.constant 1.0 : T \n %r = arith.divf %one, %0 : T",
    "__hmf_log1p": "%r = math.log1p %0 : T",
    "__hmf_relu": "%zero = arith.constant 0.0 : T \n %r = arith.maximumf %0, %zero : T",
    "__hmf_tan": "%r = math.tan %0 : T",
    "__hmf_atan": "%r = math.atan %0 : T",
    "__hmf_tanh": "%r = math.tanh %0 : T",
    "__hmf_round": "%r = math.round %0 : T",
    "__hmf_pow": "%r = math.powf %0, %1 : T",
    "__hmf_ldexp": "%scale = math.exp2 %1 : T \n %r = arith.mulf %0, %scale : T",
    "__hmf_isnan": "%r = arith.cmpf uno, %0, %0 : T",
    "__hmf_isinf": "%wide = arith.extf %0 : T to f64 \n %abs = math.absf %wide : f64 \n"
    "%inf = arith.constant 0x7FF0000000000000 : f64 \n %r = arith.cmpf oeq, %abs, %inf : f64",
}


def with_bodies(linalg):
    """The Linalg text with a definition in place of each declaration that is known here.

    Returns (text, names of the functions that are still without a body).
    """
    missing = []

    def define(declaration):
        name, arguments, result = declaration.groups()
        body = _body_of(name, arguments.split(", "), result)
        if body is None:
            missing.append(name)
            return declaration.group()
        parameters = ", ".join(f"%{i}: {type_}" for i, type_ in enumerate(arguments.split(", ")))
        return f"func.func private @{name}({parameters}) -> {result} {{\n{body}\nreturn %r : {result}\n}}"

    return _DECLARATION.sub(define, linalg), missing


def _body_of(name, arguments, result):
    number = name if name in _NUMBERS else re.sub(r"(f|Dh)$", "", name)  # __hmf_tanf is of fp32, __hmf_tanDh of fp16
    if number in _NUMBERS:
        return _NUMBERS[number].replace(": T", f": {arguments[0]}")
    tensor = re.sub(r"^triton_|_\d+$", "", name)  # triton_cumsum_0
    if tensor in _TENSORS and name.startswith("triton_"):
        return _TENSORS[tensor](Block(result), arguments)
    return None


class Block:
    """A block's type, such as tensor<4x8xf32>, and MLIR text that walks over its elements.

    In the text %i0, %i1, ... are the indices of an element, and %axis0, %axis1, ... tell which axis was asked for.
    """

    def __init__(self, type_):
        *sizes, self.element = re.fullmatch(r"tensor<(.*)>", type_).group(1).split("x")
        self.type, self.sizes = type_, [int(size) for size in sizes]
        self.axes = range(len(sizes))

    def indices(self, letter):
        return ", ".join(f"%{letter}{k}" for k in self.axes)

    def along_axis(self, letter, text):
        """Indices named by `letter`: along the axis that was asked for what `text` computes as %new, else %i."""
        lines = []
        for k in self.axes:
            lines.append(re.sub(r"%(new|t\d)", rf"%{letter}_\1_{k}", text).replace("@", str(k)))
            lines.append(f"%{letter}{k} = arith.select %axis{k}, %{letter}_new_{k}, %i{k} : index")
        return "\n".join(lines)

    def constants(self, axis, type_):
        lines = ["%c0 = arith.constant 0 : index", "%c1 = arith.constant 1 : index"]
        for k, size in enumerate(self.sizes):
            lines += [
                f"%n{k} = arith.constant {size} : index",
                f"%last{k} = arith.constant {size - 1} : index",
                f"%k{k} = arith.constant {k} : {type_}",
                f"%axis{k} = arith.cmpi eq, {axis}, %k{k} : {type_}",
            ]
        return "\n".join(lines)

    def filled(self, text):
        """A block whose element at %i0, %i1, ... is what `text` computes as %v; nothing else is read of it."""
        names = ", ".join(f"d{k}" for k in self.axes)
        same = f"affine_map<({names}) -> ({names})>"
        parallel = ", ".join('"parallel"' for _ in self.axes)
        index = "\n".join(f"%i{k} = linalg.index {k} : index" for k in self.axes)
        return (
            f"%e = tensor.empty() : {self.type}\n"
            f"%r = linalg.generic {{indexing_maps = [{same}], iterator_types = [{parallel}]}}\n"
            f"outs(%e : {self.type}) {{\n"
            f"^bb0(%out: {self.element}):\n{index}\n{text}\nlinalg.yield %v : {self.element}\n}} -> {self.type}"
        )

    def looped(self, text):
        """A block after a loop over all elements, the last index fastest: `text` makes %next of the block %b."""
        lines, before = [f"%e = tensor.empty() : {self.type}"], "%e"
        for k in self.axes:
            inner = f"%b{k}" if k < self.axes[-1] else "%b"
            lines.append(
                f"%r{k} = scf.for %i{k} = %c0 to %n{k} step %c1 iter_args({inner} = {before}) -> ({self.type}) {{"
            )
            before = inner
        lines.append(text)
        for k in reversed(self.axes):
            lines.append(f"scf.yield {'%next' if k == self.axes[-1] else f'%r{k + 1}'} : {self.type}\n}}")
        return "\n".join(lines).replace("%r0", "%r")


def _flip(block, arguments):
    return "\n".join(
        [
            block.constants("%1", arguments[1]),
            block.filled(
                block.along_axis("j", "%new = arith.subi %last@, %i@ : index")
                + f"\n%v = tensor.extract %0[{block.indices('j')}] : {block.type}"
            ),
        ]
    )


def _gather(block, arguments):
    source, index, axis = arguments
    integer = Block(index).element
    return "\n".join(
        [
            block.constants("%2", axis),
            block.filled(
                f"%at = tensor.extract %1[{block.indices('i')}] : {index}\n"
                + block.along_axis("j", f"%new = arith.index_cast %at : {integer} to index")
                + f"\n%v = tensor.extract %0[{block.indices('j')}] : {source}"
            ),
        ]
    )


def _scan(float_operation, integer_operation):
    """Of cumsum and cumprod: (block, axis, from the end)."""

    def body(block, arguments):
        type_ = block.element
        operation = integer_operation if type_.startswith("i") else float_operation
        here = "%t0 = arith.subi %last@, %i@ : index \n %new = arith.select %2, %t0, %i@ : index"
        before = (
            "%t0 = arith.subi %i@, %c1 : index \n %t1 = arith.maxsi %t0, %c0 : index \n"
            "%t2 = arith.subi %last@, %t1 : index \n %new = arith.select %2, %t2, %t1 : index"
        )
        first = ["%f = arith.constant false"]
        for k in block.axes:
            first += [
                f"%z{k} = arith.cmpi eq, %i{k}, %c0 : index",
                f"%s{k} = arith.andi %axis{k}, %z{k} : i1",
                f"%f{k} = arith.ori {f'%f{k - 1}' if k else '%f'}, %s{k} : i1",
            ]
        step = [
            block.along_axis("j", here),
            block.along_axis("p", before),
            *first,
            f"%x = tensor.extract %0[{block.indices('j')}] : {block.type}",
            f"%sum = tensor.extract %b[{block.indices('p')}] : {block.type}",
            f"%new = arith.{operation} %sum, %x : {type_}",
            f"%v = arith.select %f{block.axes[-1]}, %x, %new : {type_}",
            f"%next = tensor.insert %v into %b[{block.indices('j')}] : {block.type}",
        ]
        return block.constants("%1", arguments[1]) + "\n" + block.looped("\n".join(step))

    return body


def _sort(block, arguments):
    """Each element goes where as many are before it; of two equal ones the first stays first, and a NaN comes last."""
    type_ = block.element
    if type_.startswith("i"):
        less = [f"%lt = arith.cmpi slt, %a, %c : {type_}", f"%gt = arith.cmpi sgt, %a, %c : {type_}"]
    else:
        less = [
            f"%a_nan = arith.cmpf uno, %a, %a : {type_}",
            f"%c_nan = arith.cmpf uno, %c, %c : {type_}",
            f"%below = arith.cmpf olt, %a, %c : {type_}",
            f"%above = arith.cmpf ogt, %a, %c : {type_}",
            "%c_only = arith.cmpi ugt, %c_nan, %a_nan : i1",
            "%a_only = arith.cmpi ugt, %a_nan, %c_nan : i1",
            "%lt = arith.ori %below, %c_only : i1",
            "%gt = arith.ori %above, %a_only : i1",
        ]
    size, here = "%size = arith.constant 1 : index", "%here = arith.constant 0 : index"
    along = []
    for k in block.axes:
        size_before, here_before = (f"%size{k - 1}", f"%here{k - 1}") if k else ("%size", "%here")
        along += [
            f"%size{k} = arith.select %axis{k}, %n{k}, {size_before} : index",
            f"%here{k} = arith.select %axis{k}, %i{k}, {here_before} : index",
        ]
    last = block.axes[-1]
    step = [
        size,
        here,
        *along,
        f"%c = tensor.extract %0[{block.indices('i')}] : {block.type}",
        f"%rank = scf.for %t = %c0 to %size{last} step %c1 iter_args(%before = %c0) -> (index) {{",
        block.along_axis("j", "%new = arith.addi %t, %c0 : index"),
        f"%a = tensor.extract %0[{block.indices('j')}] : {block.type}",
        *less,
        "%first = arith.select %2, %gt, %lt : i1",
        "%second = arith.select %2, %lt, %gt : i1",
        f"%earlier = arith.cmpi slt, %t, %here{last} : index",
        "%true = arith.constant true",
        "%not_second = arith.xori %second, %true : i1",
        "%tie_first = arith.andi %earlier, %not_second : i1",
        "%counts = arith.ori %first, %tie_first : i1",
        "%one = arith.index_castui %counts : i1 to index",
        "%sum = arith.addi %before, %one : index",
        "scf.yield %sum : index",
        "}",
        block.along_axis("p", "%new = arith.addi %rank, %c0 : index"),
        f"%next = tensor.insert %c into %b[{block.indices('p')}] : {block.type}",
    ]
    return block.constants("%1", arguments[1]) + "\n" + block.looped("\n".join(step))


_TENSORS = {
    "flip": _flip,
    "gather": _gather,
    "cumsum": _scan("addf", "addi"),
    "cumprod": _scan("mulf", "muli"),
    "sort": _sort,
}
