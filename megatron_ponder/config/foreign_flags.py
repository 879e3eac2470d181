"""Flags of Megatron-LM and of Hugging Face trainers that have another name here, or none.

Read only when a flag is unknown, for the hint in the error message. Flags that mean the same here
under the same name are not listed.
"""

_ALWAYS = "leave it out, this is always so here"
_NEVER = "not available here"
_DENSE = "not available: the models here are dense"
_ITERATIONS = "lengths are in iterations here: --train-iters, --lr-warmup-iters, --lr-decay-iters"
_KERNELS = "leave it out; --kernels chooses fused or composed operations"
_ACTIVATIONS = "not available; --activation is swiglu, gelu or gelu_tanh"

HINTS: dict[str, str] = {
    # model
    "swiglu": "here it is --activation swiglu (the default)",
    "openai-gelu": "here it is --activation gelu_tanh",
    "squared-relu": _ACTIVATIONS,
    "quick-geglu": _ACTIVATIONS,
    "disable-bias-linear": "leave it out; there are no biases without --add-bias-linear",
    "group-query-attention": "leave it out; --num-query-groups is enough",
    "use-rotary-position-embeddings": "here it is --position-embedding-type rope (the default)",
    "no-position-embedding": "not available; --position-embedding-type is rope or learned_absolute",
    "rotary-scaling-factor": "here it is --rotary-seq-len-interpolation-factor",
    "layernorm-epsilon": "here it is --norm-epsilon",
    "padded-vocab-size": "here they are --vocab-size and --make-vocab-size-divisible-by",
    "init-method-xavier-uniform": "not available; --init-method is normal or small",
    "encoder-num-layers": "here it is --num-layers",
    "decoder-num-layers": "here it is --num-layers",
    "encoder-seq-length": "here it is --seq-length",
    "decoder-seq-length": "here it is --seq-length",
    "num-experts": _DENSE,
    "expert-model-parallel-size": _DENSE,
    "moe-router-topk": _DENSE,
    "mtp-num-layers": _NEVER,
    "multi-latent-attention": _NEVER,
    "window-size": _NEVER,
    # data and tokenizer
    "vocab-file": "here it is --tokenizer-model, with --tokenizer-type",
    "merge-file": "here it is --tokenizer-model, with --tokenizer-type",
    "tokenizer-name-or-path": "here it is --tokenizer-model, with --tokenizer-type",
    "data-args-path": "put the paths into a YAML file, as data_path, and give it as --config",
    "per-split-data-args-path": "here they are --train-data-path, --valid-data-path and "
    "--test-data-path",
    "mock-data": "not available; tools/benchmark.py train measures a run without data",
    "sft": "here it is --instruction-data",
    "dataloader-type": _ALWAYS,
    "partitions": "leave it out; --workers are enough",
    "split-sentences": _NEVER,
    # length, batch, precision
    "train-samples": _ITERATIONS,
    "lr-warmup-samples": _ITERATIONS,
    "lr-decay-samples": _ITERATIONS,
    "rampup-batch-size": "not available; --global-batch-size is constant",
    "batch-size": "here it is --micro-batch-size",
    "fp16": "not available; use --bf16",
    "fp8": "here it is --fp8-format",
    "accumulate-allreduce-grads-in-fp32": _ALWAYS,
    "attention-softmax-in-fp32": _ALWAYS,
    "optimizer": "leave it out, it is always AdamW",
    "start-weight-decay": "here it is --weight-decay, which is constant",
    "end-weight-decay": "here it is --weight-decay, which is constant",
    "warmup": "here it is --lr-warmup-fraction",
    "exit-signal-handler": "leave it out; SIGTERM always saves and stops",
    # layout and speed
    "model-parallel-size": "here it is --tensor-model-parallel-size",
    "tp-size": "here it is --tensor-model-parallel-size",
    "pp-size": "here it is --pipeline-model-parallel-size",
    "num-layers-per-virtual-pipeline-stage": "here it is --num-virtual-stages-per-pipeline-rank: "
    "the layers of a rank divided by that number",
    "cp-comm-type": "here it is --context-parallel-attention",
    "checkpoint-activations": "here it is --recompute-granularity",
    "recompute-activations": "here it is --recompute-granularity selective",
    "use-flash-attn": "here it is --attention-backend, whose auto takes the best that is installed",
    "use-mcore-models": _ALWAYS,
    "no-gradient-accumulation-fusion": "leave it out; off unless --gradient-accumulation-fusion",
    "no-overlap-p2p-communication": "leave it out; off unless --overlap-p2p-communication",
    "no-masked-softmax-fusion": _KERNELS,
    "no-bias-gelu-fusion": _KERNELS,
    "no-bias-swiglu-fusion": _KERNELS,
    "no-bias-dropout-fusion": _KERNELS,
    "no-rope-fusion": _KERNELS,
    "no-persist-layer-norm": _KERNELS,
    # checkpoints and logs
    "no-load-optim": "here it is --finetune, which loads the weights only",
    "no-load-rng": "here it is --finetune, which loads the weights only",
    "no-save-optim": _NEVER,
    "no-save-rng": _NEVER,
    "override-ckpt-iteration": "here it is --ckpt-step",
    "override-opt-param-scheduler": "leave it out; the flags of a run win over its checkpoint",
    "use-checkpoint-opt-param-scheduler": "give --config .../iter_*/run_config.yaml",
    "use-checkpoint-args": "give --config .../iter_*/run_config.yaml",
    "use-dist-ckpt": _ALWAYS,
    "ckpt-format": "leave it out, it is always torch_dist",
    "dist-ckpt-format": "leave it out, it is always torch_dist",
    "async-save": _NEVER,
    "yaml-cfg": "here it is --config",
    "log-throughput": _ALWAYS,
    "log-params-norm": _NEVER,
    "tensorboard-log-interval": "here it is --log-interval",
    "timing-log-level": "not available; tools/benchmark.py train measures the parts of a step",
    "profile": "tools/benchmark.py train measures a run, and profiles it on request",
    # Hugging Face trainers
    "learning-rate": "here it is --lr",
    "warmup-ratio": "here it is --lr-warmup-fraction",
    "warmup-steps": "here it is --lr-warmup-iters",
    "lr-scheduler-type": "here it is --lr-decay-style",
    "adam-epsilon": "here it is --adam-eps",
    "max-grad-norm": "here it is --clip-grad",
    "max-steps": "here it is --train-iters",
    "num-train-epochs": "here it is --train-iters: tokens / (--global-batch-size x --seq-length)",
    "per-device-train-batch-size": "here it is --micro-batch-size",
    "gradient-accumulation-steps": "here it is --global-batch-size, the sequences of an iteration "
    "over all ranks",
    "gradient-checkpointing": "here it is --recompute-granularity",
    "cutoff-len": "here it is --seq-length",
    "output-dir": "here it is --save",
    "resume-from-checkpoint": "here it is --load",
    "save-steps": "here it is --save-interval",
    "eval-steps": "here it is --eval-interval",
    "logging-steps": "here it is --log-interval",
    "model-name-or-path": "convert the model with tools/convert_checkpoint.py import, and give the "
    "result as --load",
}
"""What to do instead of each flag. A flag that a hint names is one of ours."""
