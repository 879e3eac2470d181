"""Memory that a conversion takes, against the size of the model: about one weight, not all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.launch import ROOT

SHAPE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
MEASURE = (
    "import runpy, sys; sys.argv = sys.argv[1:]\n"
    "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    "except SystemExit as end: assert not end.code, end.code\n"
    "print('PEAK', *(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))\n"
)
"""Not getrusage: its maximum counts the memory of the process that started this one."""


def write_model(folder: Path, num_layers: int, num_shards: int) -> int:
    """A folder with random weights; returns their bytes."""
    folder.mkdir()
    h, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (h, h) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (f, h) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (h, f)
        shapes |= {f"{layer}.{p}_layernorm.weight": (h,) for p in ("input", "post_attention")}
    shapes["lm_head.weight"] = (v, h)
    names = list(shapes)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[shard::num_shards]
        save_file({n: torch.rand(shapes[n]) for n in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": num_layers}))
    return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


def peak_mib(*arguments: str) -> float:
    """Run the converter; the most memory that it had, mapped files included."""
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT / "tools/convert_checkpoint.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split("PEAK")[1]) / 1024


@pytest.mark.slow
def test_memory_is_that_of_a_weight_or_two(tmp_path: Path) -> None:
    """Beyond what the libraries take, which a model of one layer tells (its weights included)."""
    peaks, sizes = {}, {}
    for name, num_layers, num_shards in (("small", 1, 1), ("large", 10, 7)):
        source, checkpoint = tmp_path / name, str(tmp_path / f"{name}.checkpoint")
        sizes[name] = write_model(source, num_layers, num_shards) / 2**20
        peaks[name] = (
            peak_mib("import", "--hf-path", str(source), "--save", checkpoint, "--no-verify"),
            peak_mib(
                *("export", "--load", checkpoint, "--hf-path", str(tmp_path / f"{name}.out")),
                *("--without-tokenizer", "--no-verify", "--max-shard-size", "200MB"),
            ),
        )
    print(f"MiB of weights: {sizes}; peaks of import and export: {peaks}")
    more_weights = sizes["large"] - sizes["small"]
    assert more_weights > 500
    for small, large in zip(peaks["small"], peaks["large"], strict=True):
        # Freed weights leave holes in the heap, more of them the more there were.
        assert large - small < 0.35 * more_weights
