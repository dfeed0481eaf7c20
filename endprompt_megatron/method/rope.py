"""RoPE from explicit position ids: the frequencies of the config to export, and Megatron's rotary module.

`frequencies` reads inverse frequencies and attention factor out of the very config that will be exported
(rope_parameters.py writes it) with transformers' own code, so training and inference cannot disagree.
`PositionRotary` turns position ids into rotary angles inside a GPTModel (GPTModel itself ignores position ids for RoPE
and counts 0..s-1).
"""

import copy
import functools
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from endprompt_megatron.method.rope_parameters import BY_LENGTH


def transformers_config(config: dict) -> Any:
    """transformers' config object for a parsed config.json of a supported family."""
    from transformers import AutoConfig

    values = copy.deepcopy(config)  # transformers writes rope_theta into the dicts that it is given
    return AutoConfig.for_model(values.pop("model_type"), **values)


def frequencies(hf_config: Any, seq_len: int | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies [d/2] float32 and attention factor, from transformers' own functions.

    `seq_len`: the length that the input reaches, which decides for dynamic scaling and LongRoPE alone.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config=hf_config)
    inv_freq, attention_factor = rotary.inv_freq, rotary.attention_scaling
    if rotary.rope_type in BY_LENGTH and seq_len is not None:
        compute = ROPE_INIT_FUNCTIONS[rotary.rope_type]
        inv_freq, attention_factor = compute(hf_config, torch.device("cpu"), seq_len=seq_len)
    return inv_freq.detach().clone().float(), float(attention_factor)


class PositionRotary(RotaryEmbedding):
    """Rotary module whose angles come from the position ids of the current micro-batch.

    `LlamaModel.forward` sets `position_ids` before each forward pass.  The parent caches its forward by
    sequence length, which would go stale here, so this one has its own, uncached.
    """

    def __init__(self, hf_config: Any, head_dim: int) -> None:
        super().__init__(kv_channels=head_dim, rotary_percent=1.0, use_cpu_initialization=True)
        self.inv_freq, self.attention_factor = frequencies(hf_config)
        self.follows_length = hf_config.rope_parameters["rope_type"] in BY_LENGTH
        self.of_length = functools.lru_cache(maxsize=16)(lambda length: frequencies(hf_config, length)[0])
        self.position_ids: Tensor | None = None  # [b or 1, s] int64; 1 where all rows share their positions

    def rotary_angles(self, position_ids: Tensor) -> Tensor:
        """Rotary angles [s, b or 1, 1, d] float32 of position ids [b or 1, s] int64.

        Positions stay integers until they meet the float32 frequencies: 65535 does not fit bfloat16.
        """
        if self.follows_length:
            # transformers takes the longest row's for all; each row's own do not depend on what shares its micro-batch.
            lengths = (position_ids.amax(dim=1) + 1).tolist()
            inv_freq = torch.stack([self.of_length(length) for length in lengths]).to(position_ids.device)
        else:
            # Moved once and kept there: a copy from the host in every forward pass would wait for the GPU.
            self.inv_freq = inv_freq = self.inv_freq.to(position_ids.device)
        half = position_ids.t()[:, :, None, None].float() * inv_freq.view(-1, 1, inv_freq.shape[-1])
        return torch.cat((half, half), dim=-1)  # half: [s, b or 1, 1, d/2]

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Rotary angles of the current position ids.  They are sliced for context parallelism already."""
        return self.rotary_angles(self.position_ids)
