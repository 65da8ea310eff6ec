"""How the CPU's native code is built, kept, shared and refused; how it fails."""

import ctypes
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import NAMED
from tolerance import assert_close

from nsa import cpu, files
from nsa.cpu import native

HERE = torch.backends.cpu.get_cpu_capability()
compress = torch.ops.nsa.nsa_compress


@pytest.fixture(autouse=True)
def new_process(monkeypatch, tmp_path):
    """As in a process that has called no op yet and warned of nothing, on a machine that has built nothing."""
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_temporary_dirs", {})
    forget()
    yield tmp_path / "cache"
    forget()


def forget():
    for cached in (native.library, cpu._choice):
        cached.cache_clear()


@pytest.fixture(scope="module")
def built():
    """The library for this machine, from the user's own cache or built by a real compiler."""
    return native._library_path(HERE)


@dataclass
class Compiler:
    """Answers as a compiler does, and in place of compiling, which takes seconds, copies what was built before."""

    folder: Path
    built: Path

    def __post_init__(self):
        self.path.write_text(
            f"""#!/bin/sh
cd {shlex.quote(str(self.folder))}
case "$*" in
*--version) cat version ;;
*-dM*) cat macros ;;
*) echo >> builds; sleep $(cat seconds); while [ "$1" != -o ]; do shift; done; cp {shlex.quote(str(self.built))} "$2" ;;
esac
"""
        )
        self.path.chmod(0o755)
        self.answer(version="c++ 12", macros="#define __AVX2__ 1", seconds="0", builds="")

    @property
    def path(self):
        return self.folder / "c++"

    @property
    def builds(self):
        return (self.folder / "builds").read_text().count("\n")

    def answer(self, **answers):
        for name, text in answers.items():
            (self.folder / name).write_text(text)


@pytest.fixture
def compiler(built, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    return Compiler(tmp_path, built)


def results():
    """Of the three ops, checked."""
    case = NAMED["spec"]
    x, weight = (t.clone().requires_grad_() for t in case.inputs[:2])
    y = compress(x, weight, *case.geometry, actual_seq_len=case.actual_seq_len)
    computed = y.detach(), *torch.autograd.grad(y, (x, weight), case.inputs[2])
    for result, exact, magnitude, terms in zip(computed, case.exact, case.magnitude, case.terms):
        assert_close(result, exact, magnitude, terms)
    return computed


def test_native_code_is_built_once(new_process):
    first = results()
    assert cpu._backend() is native
    (path,) = new_process.glob("*.so")
    before = path.stat()
    forget()
    assert all(map(torch.equal, results(), first))
    assert path.stat() == before


def test_threads_that_call_first_build_once(compiler):
    compiler.answer(seconds="0.2")
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: results(), range(4))
    assert compiler.builds == 1
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("what", ["source", "compiler's version", "flags", "option", "processor", "nothing"])
def test_what_is_built_anew_when_something_changes(what, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{compiler.path} -march=native")
    native.library(HERE)
    if what == "source":
        source = native.SOURCE.read_text()
        monkeypatch.setattr(native, "SOURCE", tmp_path / "native.cpp")
        native.SOURCE.write_text(source.replace("STEP = 16", "STEP = 8"))
    elif what == "compiler's version":
        compiler.answer(version="c++ 13")
    elif what == "flags":
        monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-O1"])
    elif what == "option":
        monkeypatch.setenv("CXX", f"{compiler.path} -march=znver3")
    elif what == "processor":  # another node of a shared home
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {what}\n\nprocessor\t: 1\n")
        monkeypatch.setattr(native, "CPUINFO", cpuinfo)
    forget()
    native.library(HERE)
    assert compiler.builds == (1 if what == "nothing" else 2)


def test_an_option_that_hides_in_a_script_is_seen_in_what_the_compiler_defines(compiler):
    native.library(HERE)
    forget()
    compiler.answer(macros="#define __AVX2__ 1\n#define __AVX512F__ 1")
    native.library(HERE)
    assert compiler.builds == 2


def test_a_processor_that_differs_does_not_matter_where_no_option_asks_for_it(compiler, monkeypatch, tmp_path):
    """An image is built on one machine and runs on others."""
    native.library(HERE)
    forget()
    monkeypatch.setattr(native, "CPUINFO", tmp_path / "none")
    native.library(HERE)
    assert compiler.builds == 1


@pytest.mark.parametrize("now", ["no compiler", "a compiler without OpenMP"])
def test_what_was_built_runs_without_the_compiler(now, compiler, monkeypatch, tmp_path):
    """As in an image whose first stage builds and whose second has the cache alone."""
    results()
    forget()
    monkeypatch.setenv("CXX", "/nowhere/c++" if now == "no compiler" else str(failing_compiler(tmp_path / "other")))
    results()
    assert cpu._backend() is native
    forget()
    monkeypatch.setattr(native, "SOURCE", tmp_path / "native.cpp")  # what was built is of no use to another version
    native.SOURCE.write_text("other")
    with pytest.raises(native.BuildError):
        native.library(HERE)


@pytest.mark.parametrize("other", ["processor", "option"])
def test_without_a_compiler_nothing_runs_that_was_built_for_something_else(other, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{compiler.path} -march=native")
    native.library(HERE)
    forget()
    if other == "processor":
        monkeypatch.setattr(native, "CPUINFO", tmp_path / "none")
    monkeypatch.setenv("CXX", "/nowhere/c++ " + ("-march=native" if other == "processor" else "-march=znver3"))
    with pytest.raises(native.BuildError, match="does not run"):
        native.library(HERE)


@pytest.mark.parametrize("fault", ["empty", "cut", "changed"])
def test_a_broken_file_is_built_anew(fault, compiler, new_process):
    """Loaded, a file that was cut would end the process."""
    native.library(HERE)
    (path,) = new_process.glob("*.so")
    content = path.read_bytes()
    half = len(content) // 2
    path.unlink()  # this process has it mapped
    path.write_bytes(
        {"empty": b"", "cut": content[:half], "changed": content[:half] + b"?" + content[half + 1 :]}[fault]
    )
    forget()
    results()
    assert compiler.builds == 2
    assert path.read_bytes() == content


def test_a_file_that_others_may_write_is_refused_and_built_anew(compiler, new_process):
    native.library(HERE)
    (path,) = new_process.glob("*.so")
    path.chmod(0o666)
    forget()
    with pytest.warns(RuntimeWarning, match=f"{path.name} is not used: others than its owner may write to {path}"):
        results()
    assert compiler.builds == 2
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_folder_that_others_may_write_to_is_refused(compiler, new_process):
    native.library(HERE)
    new_process.chmod(0o1777)
    forget()
    with pytest.warns(
        RuntimeWarning, match=f"others than its owner may write to {new_process} .*NSA_CACHE_DIR"
    ) as warned:
        results()
    assert len(warned) == 1
    assert compiler.builds == 2
    assert cpu._backend() is native


def test_a_folder_that_cannot_be_made_means_one_of_its_own(compiler, new_process):
    new_process.write_text("a file, where the folder should be")
    with pytest.warns(RuntimeWarning, match="kept for this process alone, .*File exists.*NSA_CACHE_DIR") as warned:
        results()
    assert len(warned) == 1
    assert cpu._backend() is native


def failing_compiler(folder):
    folder.mkdir()
    path = folder / "c++"
    path.write_text('#!/bin/sh\ncase "$*" in *-o*) echo "no such option: -fopenmp" >&2; exit 1; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("reason", ["no compiler", "quotes", "compiler fails", "not a library", "another struct"])
def test_without_native_code_it_says_so_once(reason, compiler, monkeypatch, tmp_path):
    if reason == "no compiler":
        monkeypatch.setenv("CXX", "/nowhere/c++ -O1")
        message = "/nowhere/c[+][+] does not run: .*No such file"
    elif reason == "quotes":
        monkeypatch.setenv("CXX", "c++ '")
        message = "No closing quotation"
    elif reason == "compiler fails":
        monkeypatch.setenv("CXX", str(failing_compiler(tmp_path / "other")))
        message = "native.so failed:\nno such option: -fopenmp"
    elif reason == "not a library":
        compiler.built = tmp_path / "text"
        compiler.built.write_text("no library")
        compiler.__post_init__()
        message = "file too short.* Let NSA_CACHE_DIR name a folder from which programs may run"
    else:
        fields = [*native.Problem._fields_, ("more", ctypes.c_int64)]
        monkeypatch.setattr(native, "Problem", type("Problem", (ctypes.Structure,), {"_fields_": fields}))
        message = "Problem has 64 bytes in C[+][+], 72 in Python"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        results()
    assert len(warned) == 1
    assert "slower than its native code" in str(warned[0].message)
    results()  # a second warning would be an error


def python(code, **variables):
    head = "import torch, nsa\nfrom nsa import cpu\nfrom nsa.cpu import native\n"
    head += "def call(): return nsa.nsa_compress(torch.ones(64, 1, 16).half(), torch.ones(32, 1).half(), 32, 16,"
    head += " actual_seq_len=[64])\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code], env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process, seconds=300):
    """Its output; kills it if it does not end."""
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()
    return output.decode()


def test_of_processes_that_start_together_one_builds(compiler):
    compiler.answer(seconds="4")  # by then all have started
    processes = [python("call(); assert cpu._backend() is native") for _ in range(2)]
    for process in processes:
        ended(process)
    assert compiler.builds == 1


def test_a_fork_while_another_thread_builds(compiler):
    compiler.answer(seconds="2")
    code = """
import os, threading, time, pathlib
thread = threading.Thread(target=call)
thread.start()
while not pathlib.Path("BUILDS").read_text():
    time.sleep(0.01)
child = os.fork()
if child == 0:
    assert torch.equal(call(), 32 * torch.ones(3, 1, 16).half())
    os._exit(7)
thread.join()
for _ in range(1200):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.05)
else:
    os.kill(child, 9)
assert ended and os.waitstatus_to_exitcode(status) == 7
"""
    ended(python(code.replace("BUILDS", str(compiler.folder / "builds"))))
    assert compiler.builds == 1


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("op", ["forward", "grad_input", "grad_weight"])
def test_every_op_says_what_it_could_not_allocate(op):
    """2^45 heads, whose weights no machine can hold: the op has to end before it reads any of them."""
    rows, windows = torch.tensor([[0, 128], [0, 1]])
    problem = native.Problem(rows.data_ptr(), windows.data_ptr(), 1, 128, 128, 1 << 45, 16, 1)
    for dtype in native.DTYPES:
        missing = getattr(native.library(HERE), f"{op}_{dtype}")(None, None, None, ctypes.byref(problem))
        assert missing >= (128 << 45) * (8 if dtype == "float64" else 4)


def test_want_of_memory_is_a_runtime_error():
    """As PyTorch's own. With little address space left, results fit and what the ops need besides does not."""
    code = """
import resource
table = nsa.table.window_table((32768,), 128, 128, torch.device("cpu"))
x, dy = torch.zeros(32768, 128, 16, dtype=torch.half), torch.zeros(256, 128, 16, dtype=torch.half)
table.begins
torch.set_num_threads(1)
library = native.library(torch.backends.cpu.get_cpu_capability())
small = nsa.table.window_table((128,), 128, 128, torch.device("cpu"))
cpu.grad_weight(dy[:1], x[:128], small)  # whatever else is needed is there
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20), resource.RLIM_INFINITY))
try:
    cpu.grad_weight(dy, x, table)
except RuntimeError as error:
    print(error)
"""
    message = ended(python(code))
    assert message.startswith("grad_weight of nsa_compress: not enough memory, ")
    assert message.endswith(" bytes could not be allocated\n")
