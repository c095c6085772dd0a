"""An architecture in which one matrix serves two modules of a block: Llama whose v_proj is its k_proj."""

from __future__ import annotations

import transformers

LAYERS = 2


class TwinConfig(transformers.LlamaConfig):
    model_type = "twin_llama"


class TwinForCausalLM(transformers.LlamaForCausalLM):
    config_class = TwinConfig
    _tied_weights_keys = {
        f"model.layers.{i}.self_attn.v_proj.weight": f"model.layers.{i}.self_attn.k_proj.weight" for i in range(LAYERS)
    }


transformers.AutoConfig.register(TwinConfig.model_type, TwinConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(TwinConfig, TwinForCausalLM, exist_ok=True)
