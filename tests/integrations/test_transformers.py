"""Log-probs of real architectures are those of ``log_softmax(model(...).logits)``, in values and all gradients."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model_types import tiny
from torch import nn
from transformers import (
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_kernels.integrations.transformers import UnsupportedModelError, log_probs, log_probs_and_entropy

V = 61
TYPES = ["gpt2", "llama", "gemma2", "cohere", "granite", "qwen3", "mistral", "phi", "opt", "bloom", "falcon_h1", "gptj"]


def naive(model, input_ids, temperature=1.0, **inputs):
    """Log-probs and entropies from the logits."""
    logits = model(input_ids=input_ids, use_cache=False, **inputs).logits[:, :-1].float() / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, input_ids[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)


def batches(ids):
    """Inputs as trainers hold them, and the tokens that count."""
    seen = torch.ones_like(ids)
    left, right = seen.clone(), seen.clone()
    left[0, :3], right[1, -4:] = 0, 0
    positions = torch.tensor([*range(5), *range(ids.shape[1] - 5)]).expand(ids.shape)
    both = left[:, 1:] * left[:, :-1], right[:, 1:] * right[:, :-1]
    return {
        "whole": ({}, torch.ones_like(ids[:, 1:])),
        "left": ({"attention_mask": left}, both[0]),
        "right": ({"attention_mask": right}, both[1]),
        "packed": ({"position_ids": positions}, (positions != 0)[:, 1:]),
    }


def gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros(()) if g is None else g for g in torch.autograd.grad(loss, parameters, allow_unused=True)]


def hold(model, ids, inputs, counts, temperature=1.0, tolerance=1e-4):
    want = [x * counts for x in naive(model, ids, temperature, **inputs)]
    got = log_probs_and_entropy(model, ids, temperature=temperature, **inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    # The weights make the gradients of all tokens different, so that none can stand in for another.
    weights = torch.linspace(1, 2, counts.numel()).view(counts.shape)
    slopes = [gradients(model, (weights * (a - 0.3 * h)).sum()) for a, h in (got, want)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.fixture
def ids():
    return torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama():
    return tiny("llama", V, 2).eval()


@pytest.mark.parametrize("model_type", TYPES)
def test_values_and_gradients_are_those_of_the_logits(model_type, ids):
    model = tiny(model_type, V, 2).eval()
    for name, (inputs, counts) in batches(ids).items():
        # What a model makes of padding and of positions is its own affair. Bloom and OPT take no positions.
        if name == "packed" and model_type in ("bloom", "opt", "falcon_h1"):
            continue
        hold(model, ids, inputs, counts, temperature=0.7)


def test_a_head_with_a_bias(ids):
    model = tiny("phi", V, 2).eval()
    nn.init.normal_(model.lm_head.bias)
    hold(model, ids, {}, torch.ones_like(ids[:, 1:]))


def test_a_mask_chooses_tokens_and_the_last_ones_can_be_kept(llama, ids):
    mask = torch.rand(ids.shape) < 0.5
    everything = log_probs(llama, ids)
    torch.testing.assert_close(log_probs(llama, ids, mask=mask), everything * mask[:, 1:])
    torch.testing.assert_close(
        log_probs(llama, ids, mask=mask.float(), logits_to_keep=5), (everything * mask[:, 1:])[:, -5:]
    )


def test_gradient_checkpointing_and_autocast(llama, ids):
    want = gradients(llama, log_probs(llama, ids).sum())
    llama.gradient_checkpointing_enable()
    llama.train()
    torch.testing.assert_close(gradients(llama, log_probs(llama, ids).sum()), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hold(llama, ids, {}, torch.ones_like(ids[:, 1:]), tolerance=0.1)


def test_compiled(llama, ids):
    compiled = torch.compile(llama, backend="aot_eager")
    torch.testing.assert_close(log_probs(compiled, ids), log_probs(llama, ids))
    with torch.no_grad():
        llama(input_ids=ids)  # the head is the model's own again
    assert "forward" not in vars(llama.lm_head)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora(peft, ids, targets, tied):
    config = tiny("llama", V, 2).config
    config.tie_word_embeddings = tied
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which is 0 at first, so that an adapter left out would not show
            nn.init.normal_(parameter)
    hold(model.eval(), ids, {}, torch.ones_like(ids[:, 1:]))
    with model.disable_adapter():
        torch.testing.assert_close(log_probs(model, ids), naive(model, ids)[0])


def test_a_bias_of_an_adapter(peft, ids):
    model = tiny("llama", V, 2)
    model.lm_head = nn.Linear(32, V)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], lora_bias=True, lora_alpha=32))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    hold(model.eval(), ids, {}, torch.ones_like(ids[:, 1:]))


@pytest.mark.parametrize("model_type", ["granite", "gemma2"])
def test_the_first_call_may_be_under_autocast(peft, model_type, ids):
    for model in (
        tiny(model_type, V, 2),
        peft.get_peft_model(tiny(model_type, V, 2), peft.LoraConfig(target_modules=["lm_head"])),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            got, want = log_probs(model, ids, use_cache=False), naive(model, ids)[0]
        assert (got - want).norm() < 0.05 * want.norm()


def test_positions_of_images_and_text(ids):
    """Three for each token."""
    qwen = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = qwen | {"vocab_size": V, "num_key_value_heads": 2, "pad_token_id": 0}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text | rope, vision_config=vision, image_token_id=1, video_token_id=2)
    ).eval()
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    torch.testing.assert_close(log_probs(model, ids, position_ids=positions), naive(model, ids)[0])


def test_a_copy_of_the_head_that_peft_trains(peft, ids):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny("mistral", V, 2), config).eval()
    (head,) = [m for n, m in model.named_modules() if n.endswith("modules_to_save.default")]
    nn.init.normal_(head.weight)
    hold(model, ids, {}, torch.ones_like(ids[:, 1:]))


def test_virtual_tokens(peft, ids):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny("mistral", V, 2), config).eval()
    got = log_probs(model, ids, attention_mask=torch.ones_like(ids))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 4:-1]
    torch.testing.assert_close(got, logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0])


def test_an_adapter_that_no_weight_stands_for_is_refused(peft, ids):
    for options, message in (({"lora_dropout": 0.1}, "has dropout"), ({"use_dora": True}, "is no plain LoRA")):
        model = peft.get_peft_model(tiny("mistral", V, 2), peft.LoraConfig(target_modules=["lm_head"], **options))
        with pytest.raises(UnsupportedModelError, match=message):
            log_probs(model.train(), ids)


class Shifted(LlamaForCausalLM):
    """Its logits are not what its configuration says."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


def test_models_whose_logits_are_something_else_are_refused(ids):
    config = copy.deepcopy(tiny("llama", V, 2).config)
    with pytest.raises(UnsupportedModelError, match="Shifted: its logits are not its last hidden states times"):
        log_probs(Shifted(config), ids)
    model = LlamaForCausalLM(config)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: its head is a Sequential"):
        log_probs(model, ids)
    with pytest.raises(UnsupportedModelError, match="encoder and a decoder"):
        log_probs(T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)), ids)
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings"):
        log_probs(LlamaForCausalLM(config).model, ids)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.ones(2, 1).long()}, ValueError, r"input_ids: has shape \(2, 1\), must be \(B, T\)"),
        ({"input_ids": torch.ones(2, 3)}, TypeError, "input_ids: has dtype torch.float32"),
        ({"logits_to_keep": 12}, ValueError, r"logits_to_keep: is 12, must be in \[1, 11\]"),
        ({"mask": torch.ones(2, 11)}, ValueError, r"mask: has shape \(2, 11\), must be \(2, 12\)"),
        ({"labels": torch.ones(2, 12)}, ValueError, "labels: is given, must be left out; no logits are made"),
        ({"return_dict": False}, ValueError, "return_dict: is given, must be left out"),
        ({"temperature": 0.0}, ValueError, "temperature: is 0.0, must be"),
        ({"mask": torch.full((2, 12), 0.5)}, ValueError, r"mask: is 0.5 at position \(0, 0\), must be 0 or 1"),
    ],
)
def test_errors_name_the_argument(llama, ids, arguments, error, message):
    with pytest.raises(error, match=message):
        log_probs(llama, **({"input_ids": ids} | arguments))


def test_threads_share_a_model(llama, ids):
    """One scores while another one runs the model as it is: neither sees the other's head."""
    expected, logits = log_probs(llama, ids).detach(), llama(ids).logits.detach()

    def score(_):
        with torch.no_grad():
            return torch.equal(log_probs(llama, ids), expected)

    def run(_):
        with torch.no_grad():
            return llama(ids).logits.shape == logits.shape

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(task, i) for i in range(40) for task in (score, run)]
        assert all(each.result() for each in found)
    assert "forward" not in vars(llama.lm_head)


WRAPPED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from model_types import tiny
from rlhf_kernels.integrations.transformers import log_probs
dist.init_process_group("gloo")
rank = dist.get_rank()
ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(1))
alone = tiny("llama", 61, 2).eval()
log_probs(alone, ids).mean().backward()
want = {name: p.grad for name, p in alone.named_parameters()}
for kind in ("ddp", "fsdp", "fsdp with the head apart"):
    model = tiny("llama", 61, 2).eval()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        if kind != "fsdp" and not model.config.tie_word_embeddings:
            fully_shard(model.lm_head)
        fully_shard(model)
    logprobs = log_probs(model, ids[2 * rank : 2 * rank + 2])
    assert torch.allclose(logprobs, log_probs(alone, ids)[2 * rank : 2 * rank + 2], atol=1e-4), kind
    logprobs.mean().backward()
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        expected = want[name.removeprefix("module.")]
        assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()), (kind, name)
dist.barrier()
os._exit(0)  # gloo's threads may outlive the interpreter, and then end the process with an error
"""


def test_ddp_and_fsdp(tmp_path):
    (tmp_path / "run.py").write_text(WRAPPED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py"]
    paths = ":".join(p for p in sys.path if p.endswith("tests/rlhf"))
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


PEAK = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from rlhf_kernels.integrations.transformers import log_probs
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=151936, **sizes))
def run(ids):
    if sys.argv[1] == "ours":
        return log_probs(model, ids).sum()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
run(torch.randint(0, 9, (1, 8))).backward()  # libraries, and room for the gradients
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(torch.randint(0, 9, (4, 1025))).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
def test_memory_is_at_most_a_quarter_of_that_with_logits():
    """4 096 tokens of a vocabulary of 151 936."""
    ours, theirs = (
        int(subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True).stdout)
        for kind in ("ours", "theirs")
    )
    assert ours < theirs / 4
