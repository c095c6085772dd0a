"""An architecture in which one matrix serves two modules of a block: Llama whose v_proj and k_proj share one weight."""

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
