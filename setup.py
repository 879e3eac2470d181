"""Package metadata and dependencies; `make install` pins torch before it."""

from setuptools import find_packages, setup

setup(
    name="megatron_ponder",
    version="0.1.0",
    description="Pretraining of language models with latent thoughts on megatron-core",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_ponder", "megatron_ponder.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "psutil",  # megatron-core's checkpoint writer needs it and does not declare it
        "numpy",
        "tyro>=1.0",
        "docstring-parser",
        "pyyaml",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "transformers>=4.56",
        "safetensors",
        "orjson",
        "pyarrow",
        "tqdm",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-xdist",
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
