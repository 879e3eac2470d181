"""The Triton kernels, one file per operation. The torch version in `kernels/` is the reference.

These modules import Triton, so they are imported only when the Triton kernels are selected. Values
are cast to fp32 right after the load, and to the tensor's dtype at the store. This matches the
precision of the references. It also avoids bf16 arithmetic in Triton's interpreter, which the tests
use on CPU and which gives wrong results in bf16.
"""
