import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "a2k" / "version.py").read_text()).group(1)

TEST = ["pytest>=8", "pytest-benchmark>=5"]
TRAIN = ["filelock>=3.12", "matplotlib>=3.8", "pyyaml>=6", "tensorboard>=2.16"]
AUDIT = ["cuxray>=0.6", "networkx>=3"]
HEIC = ["pi-heif>=1"]

setup(
    name="a2k",
    version=version,
    description="All-to-key attention as fast kernels, and the StyA2K style-transfer network built on it",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["a2k", "a2k.*", "a2k_kernels", "a2k_kernels.*"]),
    package_data={
        "a2k": ["py.typed", "weights/*.safetensors", "weights/README.md"],
        "a2k_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6,<3.10; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "numpy>=1.26",
        "pillow>=11",
        "safetensors>=0.5",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": TEST,
        "bench": TEST,
        "train": TRAIN,
        "audit": AUDIT,
        "heic": HEIC,
        "dev": [*TEST, *TRAIN, *AUDIT, *HEIC, "pytest-xdist>=3.6", "ruff>=0.6", "build>=1", "scikit-image>=0.22"],
    },
    entry_points={"console_scripts": ["a2k = a2k.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
