"""Speed of generation: the prompt, each new token with keys and values kept, and without.

One process, a model with random weights, greedy choice, random prompts of one length. Each round
continues the same prompts with a cache and then without one, so that a machine that slows down
slows both; the first round is not counted. The ratio compares the same tokens of both. Left out:
several ranks, sampling and decoding of text, which cost the same either way.
"""

import dataclasses
import statistics
import time
from typing import Any

import torch

from benchmarks.options import GenerateBenchmarkOptions
from benchmarks.train import environment
from megatron_ponder import log
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import CheckpointConfig, RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.inference.continuation import continuation
from megatron_ponder.model.build import build_model
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.runtime.distributed import running


def benchmark_generation(options: GenerateBenchmarkOptions, config: RunConfig) -> dict[str, Any]:
    """Measure a config.

    Args:
        options: how much text, how often.
        config: as given; resolved here for one process.

    Returns:
        What is printed, by name: `prefill` and `decode` with a cache, `recomputed` without,
        `speedup` (time per token without a cache over that with one), and what it ran on.

    Raises:
        ConfigError: the settings cannot work, or the text is longer than learned positions.
    """
    config = dataclasses.replace(config, checkpoint=CheckpointConfig())
    config = resolve(config, world_size=1)
    _check_length(options, config)
    with running(config.parallel, config.training.seed):
        model = build_model(config)
        model.eval()
        prompts = _prompts(options, config)
        cached, recomputed = [], []
        with log.progress(options.rounds + 1, "benchmark", " rounds") as bar:
            for _ in range(options.rounds + 1):
                cached.append(_timed(model, config, prompts, options.new_tokens, True))
                recomputed.append(
                    _timed(model, config, prompts, options.recomputed_tokens, use_cache=False)
                )
                bar.update()
    return environment(config) | _summary(options, cached[1:], recomputed[1:])


def as_text(result: dict[str, Any]) -> str:
    """The figures of `benchmark_generation` for people."""
    rows = [
        ("prefill", result["prefill"]),
        ("decode, cached", result["decode"]),
        ("decode, recomputed", result["recomputed"]),
    ]
    speedup, versions = result["speedup"], result["versions"]
    return "\n".join(
        [
            f"{result['device']}, {result['threads']} threads, torch {versions['torch']}, "
            f"megatron-core {versions['megatron_core']}, {result['date']}",
            f"{result['batch_size']} texts, {result['prompt_tokens']} tokens each, then "
            f"{result['new_tokens']} more ({result['recomputed_tokens']} recomputed)",
            "",
            f"{'':>20} {'ms':>10} {'tokens/s':>12}",
            *(f"{name:>20} {row['ms']:>10.2f} {row['tokens_per_s']:>12,.1f}" for name, row in rows),
            "",
            f"recomputed / cached: {speedup['median']:.2f} (median of rounds, from "
            f"{speedup['least']:.2f} to {speedup['largest']:.2f}), the first "
            f"{result['recomputed_tokens']} tokens",
        ]
    )


def _timed(
    model: PonderGPTModel,
    config: ResolvedConfig,
    prompts: list[torch.Tensor],
    num_tokens: int,
    use_cache: bool,
) -> list[float]:
    """Seconds until the first token of each text, and for each of the `num_tokens` behind it."""
    plan = model.method.plan(config.method.num_jacobi_iterations)
    seconds = []
    with continuation(model, plan, use_cache=use_cache) as growing:
        start_s = time.perf_counter()
        chosen = growing.begin(prompts).argmax(dim=-1).tolist()
        for _ in range(num_tokens):
            seconds.append(time.perf_counter() - start_s)
            start_s = time.perf_counter()
            chosen = growing.add(chosen).argmax(dim=-1).tolist()
        seconds.append(time.perf_counter() - start_s)
    return seconds


def _summary(
    options: GenerateBenchmarkOptions, cached: list[list[float]], recomputed: list[list[float]]
) -> dict[str, Any]:
    """Medians over rounds; a row tells the time of a step (all texts) and tokens of all texts."""
    batch_size = options.batch_size
    prefill_s = statistics.median(seconds[0] for seconds in cached)
    decode_s = statistics.median(statistics.fmean(seconds[1:]) for seconds in cached)
    recomputed_s = statistics.median(statistics.fmean(seconds[1:]) for seconds in recomputed)
    ratios = [
        sum(slow[1:]) / sum(fast[1 : len(slow)])
        for fast, slow in zip(cached, recomputed, strict=True)
    ]
    return {
        "batch_size": batch_size,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "recomputed_tokens": options.recomputed_tokens,
        "rounds": options.rounds,
        "prefill": _row(prefill_s, batch_size * options.prompt_tokens),
        "decode": _row(decode_s, batch_size),
        "recomputed": _row(recomputed_s, batch_size),
        "speedup": {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
        },
    }


def _row(seconds: float, num_tokens: int) -> dict[str, float]:
    """Time of a step and the rate of its tokens."""
    return {"ms": 1e3 * seconds, "tokens_per_s": num_tokens / seconds}


def _prompts(options: GenerateBenchmarkOptions, config: ResolvedConfig) -> list[torch.Tensor]:
    """Random ids."""
    generator = torch.Generator().manual_seed(config.training.seed)
    shape = (options.batch_size, options.prompt_tokens)
    return list(torch.randint(config.model.vocab_size, shape, generator=generator))


def _check_length(options: GenerateBenchmarkOptions, config: ResolvedConfig) -> None:
    """Refuse a text that outgrows a table of learned positions."""
    model = config.model
    num_tokens = options.prompt_tokens + options.new_tokens
    is_table = model.position_embedding_type == "learned_absolute"
    if is_table and num_tokens > model.max_position_embeddings:
        raise ConfigError(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens}: "
            f"together more than the model's {model.max_position_embeddings} learned positions."
        )
