"""What a user can get wrong: each time exit code 2 and a message, never a traceback."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_forked
from tests.e2e import launch
from tests.e2e.launch import flags, run_main, start_torchrun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a copy of it with half of its .bin, one with half of its .idx, a checkpoint."""
    folder = tmp_path_factory.mktemp("bad")
    prefix = launch.write_dataset(folder)
    for name, shortened in (("half_bin", ".bin"), ("half_idx", ".idx"), ("no_bin", "")):
        for suffix in (".bin", ".idx"):
            content = Path(prefix + suffix).read_bytes()
            if suffix == shortened:
                content = content[: len(content) // 2]
            if not (name == "no_bin" and suffix == ".bin"):
                (folder / (name + suffix)).write_bytes(content)
    code, _, err = run_main(
        flags(data_path=prefix, train_iters=2, eval_iters=0, save=folder / "run", lr_warmup_iters=0)
    )
    assert code == 0, err
    (folder / "empty").mkdir()
    damaged = folder / "damaged"
    damaged.mkdir()
    (damaged / "latest_checkpointed_iteration.txt").write_text("seven\n")
    return folder


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "heads": ({"num_query_groups": 3}, ["--num-attention-heads 4", "--num-query-groups 3"]),
    "K": ({"num_latent_thoughts": -1}, ["--num-latent-thoughts -1: must be at least 0"]),
    "vocabulary": (
        {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "{tokenizer}"},
        ["vocabulary of 320 is larger than the model's --vocab-size 64"],
    ),
    "ids beyond the vocabulary": (
        {"vocab_size": 40, "override_data": True},
        ["token ids from", "ends at 39"],
    ),
    "data of another tokenizer": ({"vocab_size": 40}, ["vocab size 64", "vocab size 40"]),
    "learned positions": (
        {"position_embedding_type": "learned_absolute", "max_position_embeddings": 16},
        ["--seq-length 32: longer than the 16 learned positions"],
    ),
    "missing .bin": ({"data_path": "{folder}/no_bin"}, ["no_bin.bin: no such file"]),
    "missing both": ({"data_path": "{folder}/nothing"}, ["nothing.idx: no such file"]),
    "truncated .bin": ({"data_path": "{folder}/half_bin"}, ["half_bin.bin", "truncated"]),
    "truncated .idx": ({"data_path": "{folder}/half_idx"}, ["half_idx.idx", "truncated"]),
    "no data": ({"data_path": None}, ["no training data: give --data-path"]),
    "method": ({"method": "ponderlm9"}, ["--method ponderlm9", "ponderlm2"]),
    "tokenizer": (
        {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "{folder}/no.model"},
        ["--tokenizer-model", "no such file"],
    ),
    "another shape": (
        {"load": "{folder}/run", "hidden_size": 64},
        ["another shape", "hidden_size", "64", "32"],
    ),
    "no checkpoint": ({"load": "{folder}/empty"}, ["empty", "--load"]),
    "no such checkpoint": ({"load": "{folder}/run", "ckpt_step": 7}, ["7"]),
    "damaged checkpoint": ({"load": "{folder}/damaged"}, ["latest_checkpointed_iteration.txt"]),
    "pipeline": ({"pipeline_model_parallel_size": 2}, ["does not divide the 1 ranks"]),
    "a file as folder": ({"save": "{folder}/corpus.jsonl"}, ["corpus.jsonl"]),
    "backend": ({"distributed_backend": "nccl"}, ["nccl", "gloo"]),
    "layers": (
        {"transformer_impl": "transformer_engine"},
        ["--transformer-impl transformer_engine: TransformerEngine not installed", "local"],
    ),
    "attention": (
        {"attention_backend": "flash", "bf16": True},
        ["--attention-backend flash: flash-attn not installed", "sdpa"],
    ),
    "fp8": (
        {"fp8_format": "hybrid", "bf16": True},
        ["--fp8-format hybrid: TransformerEngine not installed"],
    ),
    "fp8 in fp32": ({"fp8_format": "hybrid"}, ["--fp8-format hybrid needs --bf16"]),
    "missing package": ({"wandb_project": "x"}, ["pip install wandb"]),
}


@pytest.mark.parametrize("case", CASES)
def test_settings_and_files(case: str, folder: Path, tokenizer_model: str) -> None:
    settings, expected = CASES[case]
    places = {"folder": folder, "tokenizer": tokenizer_model}
    given = {
        name: value.format(**places) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    base = {"data_path": folder / "corpus_text_document", "train_iters": 4, "lr_warmup_iters": 0}
    code, _, err = run_main(flags(**{**base, **given}))
    assert code == 2, err
    for part in expected:
        assert part in err, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argument", "expected"), [("--num-layer", "num-layers"), ("--preset=llama-7b", "llama-410m")]
)
def test_flags_under_torchrun_are_told_once(argument: str, expected: str, folder: Path) -> None:
    process = start_torchrun(2, [argument, "3"] if "=" not in argument else [argument])
    output, _ = process.communicate(timeout=launch.LAUNCH_TIMEOUT_S)
    assert process.returncode != 0
    assert expected in output
    assert "exitcode  : 2" in output or "exitcode: 2" in output, output
    assert len(re.findall(r"^ConfigError: |Unrecognized options: ", output, re.M)) == 1, output


@pytest.mark.slow
def test_a_layout_that_does_not_fit_under_torchrun(folder: Path) -> None:
    """Raised by every rank, after torch is there."""
    process = start_torchrun(
        2,
        flags(
            data_path=folder / "corpus_text_document",
            tensor_model_parallel_size=2,
            num_attention_heads=3,
            num_query_groups=3,
            hidden_size=33,
        ),
    )
    output, _ = process.communicate(timeout=launch.LAUNCH_TIMEOUT_S)
    assert process.returncode != 0
    assert "--num-attention-heads 3: not a multiple of --tensor-model-parallel-size 2" in output
    assert "megatron_ponder/" not in output, output


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["preprocess_data.py", "--input", "no.jsonl", "--output-prefix", "x"], "no such file"),
        (["train_tokenizer.py", "--input", "no.jsonl", "--output", "x.model"], "no such file"),
        (["evaluate.py", "--load", "nowhere", "--data-path", "x"], "nowhere"),
        (["generate.py", "--load", "nowhere", "--prompt", "x"], "nowhere"),
        (["evaluate.py", "--load", "nowhere"], "exactly one of"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_tools(command: list[str], expected: str, tmp_path: Path) -> None:
    ended = run_forked(f"tools/{command[0]}", *command[1:], cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert expected in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
