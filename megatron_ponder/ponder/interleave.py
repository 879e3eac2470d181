"""Between stages and the interleaved sequence: the two reshapes that every method is made of.

    interleave(token_embeddings [s, b, h], thoughts [s * (n-1), b, h])  -> [s * n, b, h]
    select_slots(hidden [s * n, b, h], n, stages)                      -> [s * stages, b, h]

Both work on a contiguous or zig-zag shard of the token sequence exactly as on the whole, because
all slots of a token lie together; no communication is ever needed. What they compute, and by which
kernel, is in `kernels.interleave`; methods take them from here.
"""

from megatron_ponder.kernels.interleave import interleave, select_slots

__all__ = ["interleave", "select_slots"]
