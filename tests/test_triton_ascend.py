"""Which Tritons may stand together, and which nsa.ascend can drive: all but one are stand-ins."""

import importlib
import subprocess
import sys

import pytest

from nsa import kernels, triton_ascend


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make packages appear to be installed, each by a dist-info folder of its own; no others are seen."""

    def install(*packages):
        for name, version, *requires in packages:
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {package}" for package in requires)]
            (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]))
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        triton_ascend.toolchain_fault.cache_clear()

    yield install
    triton_ascend.toolchain_fault.cache_clear()


FINE = {
    "nothing": [],
    "triton-ascend alone": [("triton-ascend", "3.2.0")],
    "community Triton alone": [("triton", "3.6.0")],
    "3.2.1 on top of what it asks for": [("triton-ascend", "3.2.1", "numpy", "triton==3.2.0"), ("triton", "3.2.0")],
    "one that asks for no version": [("triton-ascend", "3.2.2", "triton>=3.2"), ("triton", "3.5.0")],
    "and on Arm": [("triton-ascend", "3.2.2", "triton==3.5.0; platform_machine == 'aarch64'"), ("triton", "3.5.0")],
}
BROKEN = {
    "3.2.0 and community Triton": [("triton-ascend", "3.2.0"), ("triton", "3.6.0")],
    "even of the same number": [("triton-ascend", "3.2.0"), ("triton", "3.2.0")],
    "3.2.1 and a later triton": [
        ("triton-ascend", "3.2.1", "triton==3.2.0"),
        ("triton", "3.7.1"),
    ],
    "a like-named package": [("triton-ascend", "3.2.0", "triton-viz==3.6.0"), ("triton", "3.6.0")],
}


@pytest.mark.parametrize("name", FINE)
def test_what_may_stand_together(name, installed):
    installed(*FINE[name])
    triton_ascend.check_installation()


@pytest.mark.parametrize("name", BROKEN)
def test_a_mixture_is_one_line_with_the_remedy(name, installed):
    installed(*BROKEN[name])
    (_, ascend, *_), (_, community) = BROKEN[name]
    with pytest.raises(ImportError, match="have overwritten parts of each other") as caught:
        importlib.reload(kernels)  # what the first launch imports, and nsa.ascend
    said = str(caught.value)
    assert f"triton-ascend {ascend} and triton {community} are both installed" in said
    assert f"pip uninstall -y triton triton-ascend, then pip install triton-ascend=={ascend}" in said
    assert "\n" not in said


@pytest.mark.parametrize("version", ["3.2.0", "3.2.1", "3.2.2", "3.2.0.post1", "3.2.1+gitfeee1123"])
def test_versions_that_nsa_ascend_drives(version, installed):
    installed(("triton-ascend", version, "triton==3.2.0"))
    triton_ascend.check_toolchain()


@pytest.mark.parametrize(
    ("packages", "found"),
    [
        ([("triton", "3.6.0")], "triton 3.6.0"),
        ([("triton-ascend", "3.5.0")], "triton-ascend 3.5.0"),
        ([("triton-ascend", "3.2.10")], "triton-ascend 3.2.10"),
        ([], "no triton at all"),
    ],
)
def test_other_versions_are_told_what_is_needed(packages, found, installed):
    installed(*packages)
    needed = r"nsa.ascend needs triton-ascend 3.2.0, 3.2.1 or 3.2.2, and what is installed is"
    with pytest.raises(ImportError, match=rf"{needed} {found}: install nsa-ascend\[ascend\]"):
        triton_ascend.check_toolchain()


def test_without_triton_the_check_needs_none():
    """A mixture may not survive `import triton`: what says so must not import it."""
    code = "import sys; sys.modules['triton'] = None; import nsa.kernels, nsa.ascend"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_words_of_both_kinds_of_failure():
    """3.2.0 runs a program to lower to Linalg, later versions do it in the process."""
    program = subprocess.CalledProcessError(1, "triton-adapter-opt", stderr=b"error: no such operation")
    for error, words in ((program, "error: no such operation"), (RuntimeError("PassManager"), "PassManager")):
        assert isinstance(error, triton_ascend.LOWERING_ERRORS)
        assert triton_ascend.words_of(error) == words
