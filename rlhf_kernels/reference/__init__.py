"""The definition: every family in plain PyTorch, as its equations read. Other backends are held to this one.

Computes in float32, or in float64 when given float64. Autograd differentiates it; no function here has a backward of
its own but the in-place one of :mod:`rlhf_kernels.reference.log_prob`.
"""
