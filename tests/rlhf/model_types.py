"""Tiny random models of the types that people use, with weights large enough for every mistake to show."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
TYPES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "bamba": MAMBA_2 | {"attn_layer_indices": [1]},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": GPT | {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window": 8},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "ernie4_5": {},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "falcon": {"head_dim": None},
    "falcon_h1": MAMBA_2 | {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "falcon_mamba": {"state_size": 8},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 8},
    "glm4": {},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": EXPERTS | {"sliding_window": 8},
    "gptj": GPT | {"rotary_dim": 4},
    "granite": {"logits_scaling": 3.0},
    "granitemoehybrid": MAMBA_2
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
    "jamba": {
        "num_experts": 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "llama": {"tie_word_embeddings": True},
    "llama4_text": EXPERTS | {"intermediate_size_mlp": 48},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "minimax": {"num_local_experts": 2, "block_size": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "nemotron": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "openai-gpt": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": QWEN_EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": QWEN_EXPERTS,
    "qwen3_next": QWEN_EXPERTS
    | {
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "num_hidden_layers": 8},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "xlstm": {},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
}


def tiny(model_type: str, vocabulary: int, eos: int, scale: float = 8.0) -> Any:
    """A model of the type whose matrices are ``scale`` times as large as its initialisation makes them."""
    sizes = {"vocab_size": vocabulary, "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": 0}
    settings = SIZES | sizes | TYPES[model_type]
    config = AutoConfig.for_model(model_type, **{k: v for k, v in settings.items() if v is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    return model
