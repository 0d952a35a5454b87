"""The definition of every op, in plain PyTorch and as its equations read. Other backends are tested against it.

Computes in float32, or in float64 when given float64. Autograd differentiates it. Two functions have a backward of
their own: the in-place one of :mod:`rlhf_kernels.reference.log_prob`, and the loss of flat scores in
:mod:`rlhf_kernels.reference.ranking_loss`, whose padding no compiler can trace.
"""
