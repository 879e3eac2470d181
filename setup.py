"""Package metadata and dependencies; `make install` pins torch before it."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

INSTALLATION = runpy.run_path(str(Path(__file__).parent / "megatron_ponder/installation.py"))

setup(
    name="megatron_ponder",
    version="0.1.0",
    description="Pretraining of language models with latent thoughts on megatron-core",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_ponder", "megatron_ponder.*"]),
    python_requires=">=3.11",
    install_requires=list(INSTALLATION["REQUIREMENTS"]),
    extras_require={
        "dev": [
            "pytest",
            "pytest-xdist>=3.8",
            "hypothesis",
            "tiktoken",
            "lm_eval",
            "peft",
            "accelerate",
            "triton; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            "types-psutil",
        ],
        "mutation": ["cosmic-ray", "pytest-timeout"],
        "tiktoken": ["tiktoken"],
        "wandb": ["wandb"],
    },
)
