import re
from pathlib import Path

from setuptools import find_packages, setup

TRITON_ASCEND = [
    "triton-ascend>=3.2.0,<3.3",  # which of them belongs to the machine's CANN and torch: see the README
    "pybind11",  # triton-ascend imports it and does not declare it
    "numpy<2.4",  # Triton's interpreter calls int() on one-element arrays
]

DEV = [
    "torch==2.13.0",
    "numpy<2.4",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "setuptools>=70.1",
    "ruff",
    "mypy>=1.18,<3",
    "matplotlib",
    "tqdm",
]

# read, not imported: what the package needs may not be there yet
VERSION = re.search(r'^__version__ = "(.+?)"', Path(__file__).parent.joinpath("nsa/__init__.py").read_text(), re.M)

setup(
    name="nsa-ascend",
    version=VERSION[1],
    description="nsa_compress of Native Sparse Attention: Triton kernels for Ascend, with gradients, in PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["nsa", "nsa.*"]), "nsa.kernels"],
    # a top-level module `kernels` would shadow the PyPI package of that name
    package_dir={"nsa": "nsa", "nsa.kernels": "kernels"},
    package_data={"nsa": ["py.typed"], "nsa.ascend": ["*.c", "*.csv"], "nsa.cpu": ["*.cpp"]},
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "npu": [*TRITON_ASCEND, "torch_npu"],
        "ascend": [
            *TRITON_ASCEND,
            "triton-ascend==3.2.0",
            "ascendnpu-ir==1.2.0",
            "xdsl>=0.74,<0.76",
            "ml_dtypes",
            "greenlet",
            "tqdm",
            "matplotlib",
        ],
        "cuda": ["triton>=3.6", "numpy<2.4", "tqdm"],
        "bench": ["fla-core>=0.6,<0.7", "matplotlib", "tqdm"],  # fla-core runs on GPUs; without its extras, no Triton
        "dev": DEV,
    },
)
