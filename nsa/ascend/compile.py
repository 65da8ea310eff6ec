"""From a Triton kernel to HIVM, the last stage before machine code, through the real Ascend toolchain.

    kernel --Triton--> TTIR --triton-ascend--> Linalg --bishengir-compile--> HIVM --hivmc--> machine code

The last arrow needs CANN, and this module stops before it. Results are kept on disk under a key of everything that went
in, so that a kernel whose source, sizes and tools are unchanged is compiled once.
"""

import gzip
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib import metadata, util
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa import triton_ascend
from nsa.files import cached_files, why_refused, writable_cache_dir, write_cached, write_private

from .targets import Target

if TYPE_CHECKING:
    from .hivm import Module

HIVM_FILE = "module.hivm.opt.mlir"
# Does nothing, in place of CANN's generator of machine code: without one, the A5 tools compile everything five times
# before they give up. What they hand over to it is what is wanted here.
_HIVMC = b"#!/bin/sh\n"
_SCALARS = ("i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64", "fp16", "bf16", "fp32", "fp64")
_EIGHT_BITS = ("fp8e4nv", "fp8e4b8", "fp8e5", "fp8e5b16", "fp8e4b15")  # behind pointers only


class CompileError(RuntimeError):
    """A stage of the compilation failed: `stage` is its name, `message` what the compiler said."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage, self.message = stage, message

    def __reduce__(self):
        return CompileError, (self.stage, self.message)


@dataclass(frozen=True)
class Artefacts:
    """Texts of the stages, the memory plan (None where the compiler writes none) and the compiler's notes.

    generic is the HIVM in MLIR's generic form, with affine expressions as arithmetic: what programs read.
    """

    ttir: str
    linalg: str
    hivm: str
    generic: str
    memory: list[Any] | None
    notes: list[str]

    @cached_property
    def module(self) -> "Module":
        """The generic form, parsed when it is first asked for: it takes 0.1 to 0.3 s."""
        return _reader().parse(self.generic)

    @property
    def facts(self) -> dict[str, Any]:
        """What can be read off the HIVM and the notes, as data: see `nsa.ascend.hivm.facts_of`."""
        return _reader().facts_of(self.module, self.notes)


def _reader():
    """nsa.ascend.hivm, only when it is needed: the targets are asked for on NPU machines too, which have no xDSL."""
    try:
        from . import hivm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the module {error.name.partition('.')[0]} is missing: install nsa-ascend[ascend]", name=error.name
        ) from error
    return hivm


def compile_kernel(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], target: Target
) -> Artefacts:
    """Compile a @triton.jit function for a `Target`.

    Args:
        kernel: the JIT function.
        signature: {argument: Triton type, such as "*bf16", "i32" or "fp32"}, in any order.
        constants: {tl.constexpr argument: value}; one that is left out has the default of the function. An ordinary
            argument may be named here instead of in the signature: the kernel is compiled for that value.
        target: a `nsa.ascend.targets.Target`.

    Returns:
        Artefacts, from the disk if everything that goes in is unchanged.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a name that is no argument of the kernel, one that is missing, or a type that Triton has not.
        CompileError: with the compiler's own message; on-chip overflow is one.
    """
    signature, constants = _bound(kernel, signature, constants, target)
    key = content_key(kernel, signature, constants, target)
    name = f"{key[:2]}/{key}.json.gz"
    for path in cached_files(name):
        return Artefacts(**json.loads(gzip.decompress(path.read_bytes())))
    ttir, linalg = _lower(kernel, signature, constants, target)
    artefacts = Artefacts(ttir, linalg, *to_hivm(linalg, target))
    write_cached(name, gzip.compress(json.dumps(asdict(artefacts)).encode()))
    return artefacts


def _bound(kernel, signature, constants, target):
    """The signature in the kernel's own order, which is how Triton reads it, and the constants with their defaults."""
    triton_ascend.check_toolchain()
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        raise TypeError(f"expected a function with @triton.jit and no other decorator, got {kernel!r}")
    if not isinstance(target, Target):
        raise TypeError(f"expected a Target, such as find_target('Ascend910B3'), got {target!r}")
    for what, names in (("signature {argument: type}", signature), ("constants {argument: value}", constants)):
        if not isinstance(names, Mapping):
            raise TypeError(f"expected the {what} as a dict, got {names!r}")
    constants = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default} | dict(constants)
    for what, names in (("signature", signature), ("constants", constants)):
        unknown = [name for name in names if name not in kernel.arg_names]
        if unknown:
            raise ValueError(
                f"{what}: expected arguments of {kernel.__name__}, which has {', '.join(kernel.arg_names)}, "
                f"got {', '.join(map(repr, unknown))}"
            )
    constexprs = [p.name for p in kernel.params if p.is_constexpr]
    for name in kernel.arg_names:
        if name in constexprs and name not in constants:
            raise ValueError(f"constants: expected a value for {name}, a tl.constexpr of {kernel.__name__}, got none")
        if name in signature and name in constants:
            raise ValueError(f"expected {name} in the signature or in the constants, got it in both")
        if name not in signature and name not in constants:
            raise ValueError(f"signature: expected a type for {name} of {kernel.__name__}, got none")
    for name, type_ in signature.items():
        if not (isinstance(type_, str) and (type_ in _SCALARS or _pointed_at(type_) in _SCALARS + _EIGHT_BITS)):
            raise ValueError(
                f"signature: expected one of {', '.join(_SCALARS)}, or one with * before it for a pointer, "
                f"got {type_!r} for {name}"
            )
    return {name: signature[name] for name in kernel.arg_names if name in signature}, constants


def _pointed_at(type_):
    """The type behind a pointer's type: bf16 of "*bf16", and of "*kbf16", a pointer that is only read."""
    return type_.removeprefix("*").removeprefix("k") if type_.startswith("*") else None


def map_processes(function, jobs, workers):
    """(job, future of function(job)) as they end, from `workers` processes; a break in the loop cancels the rest."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future
        finally:
            pool.shutdown(cancel_futures=True)


def content_key(kernel, signature, constants, target):
    """One string for everything that a compilation depends on."""
    parts = [kernel.cache_key, signature, {name: _constant_key(value) for name, value in constants.items()}]
    parts += [target.tools, _flags(target), versions(), [field.name for field in fields(Artefacts)]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _constant_key(value):
    """Tells 64 from "64", and a @triton.jit function from itself with another source."""
    return f"{type(value).__qualname__} {getattr(value, 'cache_key', None) or repr(value)}"


def versions():
    """Of everything between the kernel's source and HIVM."""
    return {package: metadata.version(package) for package in ("triton-ascend", "ascendnpu-ir")}


def tool(name):
    """Path of a program of the package ascendnpu-ir; FileNotFoundError that says how to get it."""
    package = util.find_spec("ascendnpuir")
    path = Path(package.origin).parent / "bin" / name if package else None
    if path is None or not path.exists():
        raise FileNotFoundError(f"expected {name} of the package ascendnpu-ir: install nsa-ascend[ascend]")
    return path


def _lower(kernel, signature, constants, target):
    """TTIR and Linalg, by triton-ascend's own passes."""
    from triton._C.libtriton import ir
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu_target = GPUTarget("npu", target.name, 32)
    backend = backends["ascend"].compiler(gpu_target)
    options = backend.parse_options(triton_ascend.lowering_options(a5=target.generation == "A5"))
    stages = {}
    backend.add_stages(stages, options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    known = {"target": gpu_target, **options.__dict__}
    implementation = backend.get_codegen_implementation()  # first: 3.2.1 replaces ASTSource.make_ir when it is asked
    try:
        source = ASTSource(kernel, signature, constants)
        module = source.make_ir(options, implementation, backend.get_module_map(), context)
        ttir = stages["ttir"](module, known)
    except Exception as error:
        raise CompileError("ttir", str(error)) from error
    ttir_text = str(ttir)
    try:
        return ttir_text, str(stages["ttadapter"](ttir, known))
    except triton_ascend.LOWERING_ERRORS as error:
        raise CompileError("ttadapter", triton_ascend.words_of(error)) from error


def _flags(target):
    flags = [
        f"--target={target.name}",
        "--enable-auto-multi-buffer=True",
        "--enable-hfusion-compile=true",
        "--enable-hivm-compile=true",
        "--enable-triton-kernel-compile=true",
        "--mlir-disable-threading",  # with threads, 1.2.0 crashes on some mix kernels, one time in ten
    ]
    if target.generation != "A5":  # the A5 tools know neither
        flags += ["--enable-auto-bind-sub-block=True", "--enable-memory-display=true"]
    return flags


def to_hivm(linalg, target):
    """HIVM, its generic form, memory plan and notes."""
    programs = _stand_ins()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "kernel.ttadapter.mlir").write_text(linalg)
        command = [tool(f"bishengir-compile{target.tools}"), "kernel.ttadapter.mlir", *_flags(target)]
        command += ["--save-temps=temps", "-o", "kernel.o"]
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path})
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        if done.returncode:
            said = [line.replace(f"{folder}/", "") for line in lines if "error:" in line.lower()] or lines
            raise CompileError("hivm", "\n".join(dict.fromkeys(said)))  # it says the same of every attempt
        hivm = folder / "temps" / HIVM_FILE
        plans = [json.loads(path.read_text()) for path in sorted(folder.glob("memory_info_*.json"))]
        memory = [record for plan in plans for record in plan["Record"]] or None
        notes = [line for line in lines if line.startswith("[NOTE]")]
        return hivm.read_text(), _generic(hivm, target), memory, notes


def _generic(hivm, target):
    command = [tool(f"bishengir-opt{target.tools}"), hivm, "--lower-affine", "--mlir-print-op-generic"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError("hivm", done.stderr)
    return done.stdout


def _stand_ins():
    """The folder with the programs that stand in for hivmc: in the cache, since programs may not run in TMPDIR."""
    folder = writable_cache_dir() / "stand-ins"
    for name in ("hivmc", "hivmc-a5"):
        program = folder / name
        if not program.exists() or program.read_bytes() != _HIVMC:
            write_private(program, _HIVMC, mode=0o755)
        reason = why_refused(program)
        if reason:
            raise RuntimeError(f"{program} is not run: {reason}")
        try:
            subprocess.run([program], check=True)
        except OSError as error:
            raise RuntimeError(
                f"programs cannot run in {folder} ({error.strerror}): NSA_CACHE_DIR must name a folder where they can"
            ) from error
    return folder
