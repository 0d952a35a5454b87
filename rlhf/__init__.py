"""The InstructGPT recipe (Ouyang et al. 2022) on top of ``rlhf_kernels``: SFT, reward model, PPO and PPO-ptx.

Each stage is a module that reads top to bottom: :mod:`rlhf.sft`, :mod:`rlhf.reward`, :mod:`rlhf.ppo`,
:mod:`rlhf.evaluate`. Each has a ``train(config)`` (or ``evaluate(config)``) that the command ``rlhf`` calls.
"""
