"""From the LLVM dialect to an object file, as a program of its own.

LLVM ends the process where it meets what it cannot translate. Here that is an exit code for `host.py` to report, and
the process that wants to run the kernel lives on. The arguments are the paths of libtriton, of the MLIR text and of the
object file, and the processor's name. libtriton is loaded by its path, because importing all of Triton takes four times
as long.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def assemble(libtriton, source, object_file, processor):
    spec = spec_from_file_location("libtriton", libtriton)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    ir, llvm = module.ir, module.llvm
    context = ir.context()
    ir.load_dialects(context)
    llvm.init_targets()
    parsed = ir.parse_mlir_module(source, context)
    parsed.context = context  # the module lives no longer than its context
    translated = llvm.to_module(parsed, llvm.context())
    llvm.optimize_module(translated, llvm.OPTIMIZE_O3)
    target = ("x86_64-unknown-linux-gnu", processor, "", [], False, True)
    Path(object_file).write_bytes(llvm.translate_to_asm(str(translated), *target))


if __name__ == "__main__":
    assemble(*sys.argv[1:])
