"""Replaces apex's module of fused weight gradients, which megatron-core imports by name.

With `gradient_accumulation_fusion` megatron-core's linear layers call
`fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(input, grad_output, main_grad)` and refuse the
setting if the import failed. torch too can accumulate a matmul into an fp32 buffer. `provide` puts
that in the module's place in megatron.core.tensor_parallel.layers (0.16 to 0.19), unless apex's is
there.
"""

import types

from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_ponder.kernels.weight_gradient import add_weight_gradient


def provide() -> None:
    """Install the replacement; does nothing the second time, or if apex's module is there."""
    if not layers._grad_accum_fusion_available:
        module = types.ModuleType("fused_weight_gradient_mlp_cuda")
        module.__dict__["wgrad_gemm_accum_fp32"] = _add
        module.__dict__["wgrad_gemm_accum_fp16"] = _add
        layers.fused_weight_gradient_mlp_cuda = module
        layers._grad_accum_fusion_available = True


def _add(x: Tensor, dy: Tensor, main_grad: Tensor) -> None:
    """main_grad += dy^T x, with any number of leading dims."""
    add_weight_gradient(main_grad, dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1)))
