"""Package metadata. Exact versions: constraints.txt; what else is needed (a compiler, OpenCV): ./run.sh setup."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: importing the package would need what is about to be installed.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "ijepa_ds/__init__.py").read_text(), re.MULTILINE).group(1)
SOURCES = ["pyarrow"]  # of images in Parquet or Arrow files, for data_prep/to_ffcv.py

setup(
    name="ijepa_ds",
    version=VERSION,
    description="I-JEPA pretraining on DeepSpeed and FFCV",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["ijepa_ds", "ijepa_ds.*"]),
    package_data={"ijepa_ds": ["py.typed"]},
    install_requires=[
        # Exact: we read the optimizer's internals, and the loader's, whose names change between releases.
        "deepspeed==0.19.8",
        "ffcv==1.0.2",
        # The oldest that was tried. 2.11 draws other initial weights from a seed than later ones: the golden losses are
        # not its, and their tests are skipped.
        "torch>=2.11",
        "torchvision",  # timm and ffcv import it
        "timm>=1.0",
        "psutil",  # deepspeed needs it too
        "pydantic>=2.10",  # DeepSpeed brings it; checks configurations
        "typing_extensions",
        "numpy",
        "numba",
        "safetensors",
        "tensorboard",
        "pyyaml",
        "pillow",
        "scipy",  # reads ImageNet's meta.mat
        "matplotlib",
        "setuptools",  # ffcv imports distutils, which Python 3.12 and later only find here
    ],
    extras_require={
        "sources": SOURCES,
        "dev": [*SOURCES, "mypy", "pytest", "pytest-xdist", "ruff", "scikit-learn", "transformers", "types-pyyaml"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
