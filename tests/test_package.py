"""What is installed: the version, and a source distribution with everything that its own tests and commands need."""

import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import nsa

ROOT = Path(__file__).parents[1]
FOLDERS = ("nsa", "kernels", "tests", "examples", "benchmarks", "docs", ".ci")
FILES = (
    "Makefile",
    "MANIFEST.in",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
)


def is_source(path):
    return path.is_file() and "__pycache__" not in path.parts and "-quick" not in path.name


def test_sdist_has_every_file(tmp_path):
    command = ["setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run([sys.executable, "-W", "ignore", *command], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        found = {name.partition("/")[2] for name in files.getnames()}
    paths = [ROOT / name for name in FILES] + [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    missing = {str(path.relative_to(ROOT)) for path in paths if is_source(path)} - found
    assert not missing
    assert all((ROOT / name).is_file() for name in FILES)
    assert not [name for name in found if ".venv" in name or name.endswith(".pyc")]


def test_one_version():
    """setup.py takes it from the package, and does not import that: what it needs may not be there yet."""
    assert nsa.__version__ == metadata.version("nsa-ascend")
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run.stdout.split() == [nsa.__version__]
