"""lm-evaluation-harness on an exported model: the recipe of docs/huggingface.md, and its numbers.

Tasks are defined here, on local files; nothing is fetched. What the harness scores is the training
path, as a direct computation shows.
"""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.hf.exports import export_case

lm_eval = pytest.importorskip("lm_eval")
task_manager = pytest.importorskip("lm_eval.tasks")

WORDS = [f"w{i}" for i in range(94)]
DOCUMENTS = [" ".join(WORDS[(i * i + 7 * d) % 94] for i in range(30)) for d in range(3)]
CHOICES = [
    {"question": f"w{i} w{2 * i} w5", "choices": [f"w{i + 1} w3", f"w{i + 2} w4"], "answer": i % 2}
    for i in range(5)
]


def task(name, file, **settings):
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file)},
            "cache_dir": str(file.parent / "cache"),
        },
        "test_split": "test",
        **settings,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a model with a tokenizer of words; id 0 ends documents."""
    folder = tmp_path_factory.mktemp("lm_eval") / "export"
    export_case("llama_ponderlm2_k2_j2", folder, is_sharper=True)
    vocabulary = {"<end>": 0, "<unknown>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", bos_token="<end>"
    )
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    files = {"documents": [{"text": text} for text in DOCUMENTS], "choices": CHOICES}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    perplexity = task(
        "local_perplexity",
        folder / "documents.jsonl",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    choice = task(
        "local_choice",
        folder / "choices.jsonl",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}],
    )
    for config in (perplexity, choice):
        (folder / f"{config['task']}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


def evaluate(folder, tasks, names, arguments):
    manager = task_manager.TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},trust_remote_code=True,dtype=float32,{arguments}",
        tasks=names,
        task_manager=manager,
        device="cpu",
        batch_size=2,
        log_samples=True,
        bootstrap_iters=0,
    )


@torch.no_grad()
def log_likelihoods(model, tokenizer, text, context="<end>"):
    """Of each token of a text after a context, by the training path."""
    ids = tokenizer(f"{context} {text}", return_tensors="pt").input_ids
    log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
    num_context = len(tokenizer(context).input_ids)
    return log_probabilities.gather(1, ids[0, 1:, None])[num_context - 1 :, 0]


def test_harness_refuses_the_folder_without_its_code(exported, tasks):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={exported}",
            tasks=["local_choice"],
            task_manager=task_manager.TaskManager(include_path=str(tasks), include_defaults=False),
            device="cpu",
        )


@pytest.mark.parametrize(("k", "r"), [(2, 2), (2, 6), (1, 3)])
def test_harness_scores_the_training_path(exported, tasks, k, r):
    arguments = f"num_latent_thoughts={k},num_jacobi_iterations={r}"
    names = ["local_perplexity", "local_choice"]
    results = evaluate(exported, tasks, names, arguments)
    model = AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True, num_latent_thoughts=k, num_jacobi_iterations=r
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    total = sum(float(log_likelihoods(model, tokenizer, text).sum()) for text in DOCUMENTS)
    found = results["results"]["local_perplexity"]
    num_words = sum(len(text.split()) for text in DOCUMENTS)
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert math.isclose(found["word_perplexity,none"], math.exp(-total / num_words), rel_tol=1e-4)
    assert math.isclose(found["bits_per_byte,none"], -total / num_bytes / math.log(2), rel_tol=1e-4)
    for sample in results["samples"]["local_choice"]:
        document = sample["doc"]
        for choice, (answer,) in zip(document["choices"], sample["resps"], strict=True):
            expected = log_likelihoods(model, tokenizer, choice, document["question"]).sum()
            assert math.isclose(float(answer[0]), float(expected), abs_tol=1e-3)
    # The settings have reached the model: others give other numbers.
    model.config.num_jacobi_iterations = r + 1
    other = sum(float(log_likelihoods(model, tokenizer, text).sum()) for text in DOCUMENTS)
    assert abs(other - total) > 1e-3 * abs(total)
