"""Architectures in which one tensor serves two modules: Llama whose v_proj and k_proj share one weight, or whose blocks share a
matrix, or a norm."""

from __future__ import annotations

import transformers

LAYERS = 2


class SharingConfig(transformers.LlamaConfig):
    model_type = "sharing_llama"


class SharingForCausalLM(transformers.LlamaForCausalLM):
    config_class = SharingConfig
    _tied_weights_keys = {
        f"model.layers.{i}.self_attn.v_proj.weight": f"model.layers.{i}.self_attn.k_proj.weight" for i in range(LAYERS)
    }


transformers.AutoConfig.register(SharingConfig.model_type, SharingConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(SharingConfig, SharingForCausalLM, exist_ok=True)


class AcrossConfig(transformers.LlamaConfig):
    model_type = "across_llama"


class AcrossForCausalLM(transformers.LlamaForCausalLM):
    """One matrix serves two blocks."""

    config_class = AcrossConfig
    _tied_weights_keys = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}


transformers.AutoConfig.register(AcrossConfig.model_type, AcrossConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(AcrossConfig, AcrossForCausalLM, exist_ok=True)


class NormConfig(transformers.LlamaConfig):
    model_type = "norm_llama"


class NormForCausalLM(transformers.LlamaForCausalLM):
    """One norm serves both blocks, twice in one of them, and another a block and the head."""

    config_class = NormConfig
    _tied_weights_keys = {
        "model.layers.1.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight": "model.layers.0.input_layernorm.weight",
        "model.norm.weight": "model.layers.0.post_attention_layernorm.weight",
    }


transformers.AutoConfig.register(NormConfig.model_type, NormConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(NormConfig, NormForCausalLM, exist_ok=True)
