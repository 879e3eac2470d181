"""Speed of generation: the prompt, each new token with a cache of keys and values, and without.

One process, a model with random weights, greedy choice, random prompts of one length. Each round
continues the same prompts with a cache and then without, so that a slowdown of the machine hits
both; the first round is not counted. The ratio compares the same tokens. Left out: several ranks,
sampling and decoding of text.
"""

import dataclasses
import statistics
import time
from typing import Any

import torch

from benchmarks import report
from benchmarks.commands import GenerateOptions
from megatron_ponder import log
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import CheckpointConfig, RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.inference.continuation import continuation
from megatron_ponder.model.build import build_model
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.runtime.distributed import running


def measure(options: GenerateOptions, config: RunConfig) -> dict[str, Any]:
    """Measure a config.

    Args:
        options: how much text, how often.
        config: as given; resolved here for one process.

    Returns:
        `prefill` and `decode` with a cache, `recomputed` without, `speedup` (time per token without
        a cache over that with one), and the environment.

    Raises:
        ConfigError: the settings cannot work, or the text is longer than learned positions.
    """
    config = dataclasses.replace(config, checkpoint=CheckpointConfig())
    config = resolve(config, world_size=1)
    _check_length(options, config)
    cached, recomputed = [], []
    with running(config.parallel, config.training.seed):
        model = build_model(config)
        model.eval()
        generator = torch.Generator().manual_seed(config.training.seed)
        shape = (options.batch_size, options.prompt_tokens)
        prompts = list(torch.randint(config.model.vocab_size, shape, generator=generator))
        with log.progress(options.rounds + 1, "benchmark", " rounds") as bar:
            for _ in range(options.rounds + 1):
                cached.append(_timed(model, config, prompts, options.new_tokens, True))
                recomputed.append(_timed(model, config, prompts, options.recomputed_tokens, False))
                bar.update()
    return report.environment(config) | _summary(options, cached[1:], recomputed[1:])


def _timed(
    model: PonderGPTModel,
    config: ResolvedConfig,
    prompts: list[torch.Tensor],
    num_tokens: int,
    use_cache: bool,
) -> list[float]:
    """Seconds until the first token of each text, and for each of the `num_tokens` after it."""
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
    options: GenerateOptions, cached: list[list[float]], recomputed: list[list[float]]
) -> dict[str, Any]:
    """Medians over rounds: time of a step (all texts), and tokens of all texts per second."""
    ratios = [
        sum(slow[1:]) / sum(fast[1 : len(slow)])
        for fast, slow in zip(cached, recomputed, strict=True)
    ]

    def row(seconds: list[float], num_tokens: int) -> dict[str, float]:
        median_s = statistics.median(seconds)
        return {"ms": 1e3 * median_s, "tokens_per_s": num_tokens / median_s}

    settings = ("batch_size", "prompt_tokens", "new_tokens", "recomputed_tokens", "rounds")
    b = options.batch_size
    return {name: getattr(options, name) for name in settings} | {
        "prefill": row([seconds[0] for seconds in cached], b * options.prompt_tokens),
        "decode": row([statistics.fmean(seconds[1:]) for seconds in cached], b),
        "recomputed": row([statistics.fmean(seconds[1:]) for seconds in recomputed], b),
        "speedup": report.spread(ratios),
    }


def as_text(result: dict[str, Any]) -> str:
    """A result as a table."""
    names = {"prefill": "prefill", "decode": "decode, cached", "recomputed": "decode, recomputed"}
    rows = [(name, result[k]["ms"], result[k]["tokens_per_s"]) for k, name in names.items()]
    return (
        f"{report.heading(result)}\n"
        f"{result['batch_size']} texts, {result['prompt_tokens']} tokens each, then "
        f"{result['new_tokens']} more ({result['recomputed_tokens']} recomputed)\n\n"
        f"{report.table(('', 'ms', 'tokens/s'), rows)}\n\n"
        f"recomputed / cached: {report.spread_text(result['speedup'])}, the first "
        f"{result['recomputed_tokens']} tokens"
    )


def _check_length(options: GenerateOptions, config: ResolvedConfig) -> None:
    """Refuse a text that outgrows a table of learned positions."""
    model = config.model
    num_tokens = options.prompt_tokens + options.new_tokens
    is_table = model.position_embedding_type == "learned_absolute"
    if is_table and num_tokens > model.max_position_embeddings:
        raise ConfigError(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens}: "
            f"together more than the model's {model.max_position_embeddings} learned positions."
        )
