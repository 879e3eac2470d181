"""The kernels in Triton, one file per operation; each is defined by its reference in `kernels/`.

Importing a module here needs Triton, so that only functions that were told to use it import one.
Values are cast to fp32 right after they are loaded and to the tensor's dtype where they are stored:
that is the precision of the references, and Triton's interpreter, in which the tests run on CPU,
computes wrongly in bf16.
"""
