"""A fresh process with torch and transformers, in which our package and megatron do not exist."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.exports import CASES, export_case
from tests.hf.reference import LOGITS_ABSOLUTE, largest_difference

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "megatron_ponder", "tests"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
"""
SCRIPT = """
import json, sys
for name in ("megatron", "megatron_ponder"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} could be imported")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
result = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = load_file(f"{folder}/case.safetensors")["input_ids"]
    new = model.generate(ids[:1, :6], max_new_tokens=8, do_sample=False, eos_token_id=None)
    result[folder] = {"logits": model(ids).logits.tolist(), "generated": new.tolist()}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What the process computed, by case."""
    folder = tmp_path_factory.mktemp("process")
    (folder / "sitecustomize.py").write_text(BLOCK)
    names = ["llama_ponderlm2_k2_j2", "gpt_neox_ponderlm_k2", "gpt_neox_pause_k2"]
    folders = [export_case(name, folder / name) for name in names]
    for name, path in zip(names, folders, strict=True):
        (path / "case.safetensors").write_bytes((CASES / name / "case.safetensors").read_bytes())
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(folder),
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return {name: result[str(path)] for name, path in zip(names, folders, strict=True)}


def test_logits_and_generation(answer):
    assert len(answer) == 3
    for name, found in answer.items():
        case = load_file(CASES / name / "case.safetensors")
        logits = torch.tensor(found["logits"])
        assert largest_difference(logits, case["logits"]) <= LOGITS_ABSOLUTE
        if "generated" in case:
            assert found["generated"] == case["generated"].tolist()
