"""Which Triton is installed, and all that differs between the versions of triton-ascend. Nothing else asks.

| | 3.2.0 | 3.2.1 and 3.2.2 | main |
|---|---|---|---|
| a community `triton` beside it | breaks both | it brings its own, and writes over that | as 3.2.1 |
| `extract_slice` | in `triton.language` | in `triton.language.extra.cann.extension` | as 3.2.1 |
| kernels for A5 | never | where it finds an A5 card, or is told | as 3.2.1 |
| a failure on the way to Linalg | CalledProcessError | RuntimeError | as 3.2.1 |
| its methods that lower a kernel | as `nsa.ascend` calls them | the same | others |

3.2.0 was run. 3.2.1 and main were read, as they were in April 2026. Of 3.2.2 it is assumed that it is as 3.2.1.
"""

import re
import subprocess
import warnings
from functools import cache
from importlib import import_module, metadata

TOOLCHAINS = ("3.2.0", "3.2.1", "3.2.2")  # that nsa.ascend can drive
LOWERING_ERRORS = (subprocess.CalledProcessError, RuntimeError)
CRASH = "PLEASE submit a bug report"  # what LLVM's programs say when they crash
ATTEMPTS = 5


def check_installation():
    """ImportError, with the remedy, if triton-ascend and a `triton` that it does not bring itself are installed.

    Both install into one folder, and each leaves the other half overwritten: what then imports is neither.
    """
    _raise(_mixture())


def check_toolchain():
    """ImportError, with the remedy, unless the triton that is installed is one that nsa.ascend can drive."""
    _raise(toolchain_fault())


@cache
def toolchain_fault():
    """What check_toolchain says, or "". It looks at what is installed, and imports nothing, as a mixture may break."""
    installed = {package: _version(package) for package in ("triton-ascend", "triton")}
    ascend = re.match(r"\d+\.\d+\.\d+", installed["triton-ascend"] or "")
    if ascend and ascend[0] in TOOLCHAINS:
        return _mixture()
    found = [f"{package} {version}" for package, version in installed.items() if version]
    return (
        f"nsa.ascend needs triton-ascend {', '.join(TOOLCHAINS[:-1])} or {TOOLCHAINS[-1]}, and what is installed is "
        f"{found[0] if found else 'no triton at all'}: install nsa-ascend[ascend] in an environment of its own"
    )


def find_extract_slice():
    """The function that cuts a part out of a block; None for community Triton, which has none."""
    import triton.language as tl
    from triton.backends import backends

    if "ascend" not in backends:
        return None
    module = tl if hasattr(tl, "extract_slice") else import_module("triton.language.extra.cann.extension")
    return module.extract_slice


def lowering_options(a5):
    """Options of the Ascend backend for a chip that is not at hand: left out, the card in this machine decides."""
    return {"compile_on_910_95": a5, "enable_select_analysis": True} if a5 else {"compile_on_910_95": False}


def words_of(error):
    """What one of LOWERING_ERRORS says."""
    return error.stderr.decode() if isinstance(error, subprocess.CalledProcessError) else str(error)


def launch_again_after_a_crash(launch):
    """launch(), and again, with a warning, where the Ascend compiler crashed: bishengir-compile 1.2.0 does so on one of
    ten of some kernels for cube and vector cores together, because its threads race. Any other error is raised."""
    from triton.compiler.errors import MLIRCompilationError  # triton-ascend's

    for attempt in range(1, ATTEMPTS):
        try:
            return launch()
        except MLIRCompilationError as error:
            if CRASH not in str(error):
                raise
            warnings.warn(f"the Ascend compiler crashed, attempt {attempt} of {ATTEMPTS}", stacklevel=2)
    return launch()


def check_a5(target):
    """RuntimeError if kernels launched on a GPUTarget, of generation A5, would be compiled for another generation."""
    from triton.compiler.compiler import make_backend

    if not make_backend(target).parse_options({}).compile_on_910_95:
        raise RuntimeError(
            f"{target.arch} is a chip of generation A5, and triton-ascend {_version('triton-ascend')} compiles for A2 "
            "and A3 here: 3.2.0 always does, later versions where neither the PCI bus nor `npu-smi info` shows them an "
            "A5 card"
        )


def _raise(fault):
    if fault:
        raise ImportError(fault)


def _mixture():
    ascend, community = _version("triton-ascend"), _version("triton")
    if not ascend or not community or _asks_for(community):
        return ""
    return (
        f"triton-ascend {ascend} and triton {community} are both installed, and have overwritten parts of each other: "
        f"pip uninstall -y triton triton-ascend, then pip install triton-ascend=={ascend}"
    )


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _asks_for(community):
    """Whether the installed triton-ascend requires a `triton`, and this version of it where it names one."""
    required = re.findall(r"^triton(?![\w-]).*", "\n".join(metadata.requires("triton-ascend") or ()), re.MULTILINE)
    named = re.findall(r"== *([\w.]+)", "\n".join(line.partition(";")[0] for line in required))
    return bool(required) and (not named or community in named)
