"""InstructGPT in miniature: the paper's experiment on two CPU cores (``make demo``)."""
