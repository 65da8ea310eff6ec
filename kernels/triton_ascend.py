"""Which Triton is installed, and all that differs between the versions of triton-ascend. Nothing else asks.

| | 3.2.0 | 3.2.1 and 3.2.2 | main, after them |
|---|---|---|---|
| community `triton` beside it | breaks both | installed by itself, and written over | likewise |
| `extract_slice` | in `triton.language` | in `triton.language.extra.cann.extension` | likewise |
| A5 chips | compiled as if they were A2 | if it finds the card | likewise |
| failure while it lowers to Linalg | CalledProcessError | RuntimeError | likewise |
| what lowers a kernel with no device | its own methods | the same methods | others: `nsa.ascend` has no part in it |

Only 3.2.0 was run; 3.2.1 and main were read, in April 2026's sources; of 3.2.2 it is assumed that it is like 3.2.1.
"""

import re
import subprocess
from functools import cache
from importlib import import_module, metadata

TOOLCHAINS = ("3.2.0", "3.2.1", "3.2.2")  # that nsa.ascend can drive
LOWERING_ERRORS = (subprocess.CalledProcessError, RuntimeError)


def check_installation():
    """ImportError, with the remedy, if triton-ascend and a `triton` that it does not bring itself are installed.

    Both install into one folder, and each leaves the other half overwritten: what then imports is neither.
    """
    ascend, community = _version("triton-ascend"), _version("triton")
    if not ascend or not community or community in _brought_along():
        return
    raise ImportError(
        f"triton-ascend {ascend} and triton {community} are both installed, and have overwritten parts of each other: "
        f"pip uninstall -y triton triton-ascend, then pip install triton-ascend=={ascend}"
    )


@cache
def check_toolchain():
    """ImportError, with the remedy, unless the triton that is installed is one that nsa.ascend can drive."""
    check_installation()
    installed = {package: _version(package) for package in ("triton-ascend", "triton")}
    ascend = re.match(r"\d+\.\d+\.\d+", installed["triton-ascend"] or "")
    if not ascend or ascend[0] not in TOOLCHAINS:
        found = [f"{package} {version}" for package, version in installed.items() if version]
        raise ImportError(
            f"nsa.ascend needs triton-ascend {', '.join(TOOLCHAINS[:-1])} or {TOOLCHAINS[-1]}, and what is installed "
            f"is {found[0] if found else 'no triton at all'}: install nsa-ascend[ascend] in an environment of its own"
        )


def find_extract_slice():
    """The function that cuts a part out of a block; None for a Triton that has none, as community Triton."""
    import triton.language as tl

    if hasattr(tl, "extract_slice"):
        return tl.extract_slice
    try:
        return import_module("triton.language.extra.cann.extension").extract_slice
    except ModuleNotFoundError:
        return None


def lowering_options(a5):
    """Options of the Ascend backend for a chip that is not at hand: left out, the card in this machine decides."""
    return {"compile_on_910_95": a5, "enable_select_analysis": True} if a5 else {"compile_on_910_95": False}


def words_of(error):
    """What one of LOWERING_ERRORS says."""
    return error.stderr.decode() if isinstance(error, subprocess.CalledProcessError) else str(error)


def check_a5(chip):
    """RuntimeError if kernels launched on `chip`, of generation A5, would be compiled for another generation."""
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    if not backends["ascend"].compiler(GPUTarget("npu", chip, 0)).parse_options({}).compile_on_910_95:
        raise RuntimeError(
            f"{chip} is a chip of generation A5, and triton-ascend {_version('triton-ascend')} compiles for A2 and A3 "
            "here: 3.2.0 always does, later versions where neither the PCI bus nor `npu-smi info` shows them an A5 card"
        )


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _brought_along():
    """Versions of community triton that the installed triton-ascend asks for itself."""
    return re.findall(r"^triton *== *([\w.]+)", "\n".join(metadata.requires("triton-ascend") or ()), re.MULTILINE)
