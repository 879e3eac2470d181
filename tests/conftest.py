"""What tests of several kinds share: one small tokenizer, and Triton's interpreter without CUDA.

Triton decides when it is imported whether its kernels are compiled or interpreted, and
megatron-core imports it. So the variable is set before anything else is, for this process and the
ranks that it starts. It does not make anything use Triton: on CPU `--kernels auto` is torch.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, and start processes

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from tests.unit.data import corpora  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put short tests last, where they keep all workers busy to the end."""
    items.sort(key=lambda item: "unit" in item.path.parts and "thorough" not in item.keywords)


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))
