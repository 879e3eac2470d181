r"""Evaluates an exported model with torch and transformers alone, and generates a sample.

    python examples/quickstart/huggingface.py --model runs/quickstart/ponderlm2-huggingface \
        --text runs/quickstart/corpus/held_out.jsonl --seq-length 128 --prompt "def get_"

This is what a user of the exported folder would write: it imports nothing of megatron_ponder. The
text is packed and cut as in tools/evaluate.py, so both must report the same perplexity. Prints one
JSON object.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer


def read_stream(path: Path, tokenizer: Tokenizer) -> Tensor:
    """Ids of all documents, int64 [n + 1]: an end id first and after each document."""
    end = tokenizer.eos_token_id
    ids = [end]
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        ids.append(end)
    return torch.tensor(ids)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: Tensor, seq_length: int, batch_size: int) -> float:
    """Mean cross entropy per token in nats, over windows that do not overlap.

    Args:
        model: in evaluation mode.
        ids: int64 [n + 1]; the last n are predicted, each once.
        seq_length: tokens per window; the last window may be shorter and is a batch of its own.
        batch_size: windows per forward.
    """
    num_predicted = len(ids) - 1
    whole = num_predicted // seq_length * seq_length
    total = 0.0
    with tqdm(total=num_predicted, desc="transformers", unit=" tokens", unit_scale=True) as bar:
        for first, length in ((0, whole), (whole, num_predicted - whole)):
            width = min(seq_length, length) or 1
            tokens = ids[first : first + length].view(-1, width)
            labels = ids[first + 1 : first + length + 1].view(-1, width)
            for rows, targets in zip(
                tokens.split(batch_size), labels.split(batch_size), strict=True
            ):
                logits = model(rows).logits.float()
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                total += float(loss)
                bar.update(rows.numel())
    return total / num_predicted


def main() -> None:
    """Parse flags, evaluate, sample, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the exported folder")
    parser.add_argument("--text", type=Path, required=True, help="JSON Lines with a key `text`")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens per window")
    parser.add_argument("--prompt", required=True, help="start of the sample")
    parser.add_argument("--max-new-tokens", type=int, default=120, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the sample")
    parser.add_argument("--top-k", type=int, default=40, help="sample from this many tokens")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True).eval()
    loss = mean_loss(model, read_stream(options.text, tokenizer), options.seq_length, 8)
    set_seed(1234)
    prompt = tokenizer(options.prompt, return_tensors="pt", add_special_tokens=False)
    sample = model.generate(
        **prompt,
        max_new_tokens=options.max_new_tokens,
        do_sample=True,
        temperature=options.temperature,
        top_k=options.top_k,
    )
    text = tokenizer.decode(sample[0], skip_special_tokens=True)
    result = {"class": type(model).__name__, "loss": loss, "perplexity": math.exp(loss)}
    print(json.dumps(result | {"sample": text}, indent=1))


if __name__ == "__main__":
    main()
