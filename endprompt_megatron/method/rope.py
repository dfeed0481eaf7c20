"""RoPE from explicit position ids: the config to export, its frequencies, and Megatron's rotary module.

`scaled_config` writes the scaling into the Hugging Face config that will be exported; `frequencies` reads
inverse frequencies and attention factor back out of that very config with transformers' own code, so
training and inference cannot disagree.  `PositionRotary` turns position ids into rotary angles inside a GPTModel
(GPTModel itself ignores position ids for RoPE and counts 0..s-1).
"""

import copy
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.method.rope_parameters import rope_parameters


def scaled_config(
    config: dict,
    rope_type: str,
    factor: float,
    original: int,
    target: int,
    where: str,
    default_theta: float = 10000.0,
) -> dict:
    """HF config (parsed config.json) with the RoPE scaling of the extension; the input is not changed.

    The scaling is written twice: `rope_parameters` is what transformers 5 reads, `rope_theta` with
    `rope_scaling` what transformers 4 and vLLM read.  `max_position_embeddings` becomes `target`, except
    for `dynamic`, whose formula takes it as the original window.

    ntk: a fixed change of base, theta' = theta * factor^(d / (d - 2)), so it needs no scaling type.
    none: the model's own scaling stays.  keep: its window too: what is exported is what the model came with.
    llama3: original LLaMA-3.1 scaling; a base that has it already (3.1 to 3.3) gets the product of both factors.
    `default_theta`: what the model's family means by a base that is left out.  Raises InputError if the base is
    scaled already and the type cannot be composed with that.
    """
    config = copy.deepcopy(config)
    own = rope_parameters(config, default_theta)
    theta, base_type, base = float(own.theta), own.type, own.scaling
    if base_type != "default" and rope_type not in ("none", "keep") and (base_type, rope_type) != ("llama3", "llama3"):
        raise InputError(
            f"{where}: context.rope.type={rope_type} cannot be put on top of the model's own {base_type} scaling: "
            f"use {'llama3 or none' if base_type == 'llama3' else 'none'}, or keep to train in its own window"
        )
    scaling: dict[str, Any] | None = None
    if rope_type in ("linear", "dynamic"):
        scaling = {"rope_type": rope_type, "factor": factor}
    elif rope_type == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif rope_type == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": factor * base.get("factor", 1.0),
            "low_freq_factor": base.get("low_freq_factor", 1.0),
            "high_freq_factor": base.get("high_freq_factor", 4.0),
            "original_max_position_embeddings": base.get("original_max_position_embeddings", original),
        }
    elif rope_type == "ntk":
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        theta = theta * factor ** (dim / (dim - 2))
    elif base_type != "default":  # none and keep
        scaling = {"rope_type": base_type, **base}
    config["rope_theta"] = theta
    config["rope_scaling"] = dict(scaling) if scaling else None  # theta inside would make transformers 4 complain
    config["rope_parameters"] = dict(scaling or {"rope_type": "default"}, rope_theta=theta)
    if rope_type != "keep":
        config["max_position_embeddings"] = original if rope_type == "dynamic" else target
    return config


def transformers_config(config: dict) -> Any:
    """transformers' config object for a parsed config.json of a supported family."""
    from transformers import AutoConfig

    values = copy.deepcopy(config)  # transformers writes rope_theta into the dicts that it is given
    return AutoConfig.for_model(values.pop("model_type"), **values)


def frequencies(hf_config: Any, seq_len: int | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies [d/2] float32 and attention factor, from transformers' own functions.

    `seq_len` matters for dynamic scaling alone: the length that the input reaches.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config=hf_config)
    inv_freq, attention_factor = rotary.inv_freq, rotary.attention_scaling
    if rotary.rope_type == "dynamic" and seq_len is not None:
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["dynamic"](hf_config, torch.device("cpu"), seq_len=seq_len)
    return inv_freq.detach().clone().float(), float(attention_factor)


class PositionRotary(RotaryEmbedding):
    """Rotary module whose angles come from the position ids of the current micro-batch.

    `LlamaModel.forward` sets `position_ids` before each forward pass.  The parent caches its forward by
    sequence length, which would go stale here, so this one has its own, uncached.
    """

    def __init__(self, hf_config: Any, head_dim: int) -> None:
        super().__init__(kv_channels=head_dim, rotary_percent=1.0, use_cpu_initialization=True)
        self.inv_freq, self.attention_factor = frequencies(hf_config)
        self.dynamic_config = hf_config if hf_config.rope_parameters["rope_type"] == "dynamic" else None
        self.position_ids: Tensor | None = None  # [b or 1, s] int64; 1 where all rows share their positions

    def rotary_angles(self, position_ids: Tensor) -> Tensor:
        """Rotary angles [s, b or 1, 1, d] float32 of position ids [b or 1, s] int64.

        Positions stay integers until they meet the float32 frequencies: 65535 does not fit bfloat16.
        """
        # Moved once and kept there: a copy from the host in every forward pass would wait for the GPU.
        self.inv_freq = inv_freq = self.inv_freq.to(position_ids.device)
        if self.dynamic_config is not None:
            # As transformers does: the frequencies are those of the length that this input reaches.
            inv_freq = frequencies(self.dynamic_config, int(position_ids.max()) + 1)[0].to(position_ids.device)
        half = position_ids.t()[:, :, None, None].float() * inv_freq  # [s, b or 1, 1, d/2]
        return torch.cat((half, half), dim=-1)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Rotary angles of the current position ids.  They are sliced for context parallelism already."""
        return self.rotary_angles(self.position_ids)
