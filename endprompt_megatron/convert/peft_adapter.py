"""LoRA's adapters of a checkpoint as PEFT stores them: adapter_config.json and adapter_model.safetensors.

What was trained beside them (embeddings, norms) is there complete, as PEFT's modules_to_save.  A and B are those of
training, in float32; the scale is alpha / rank in both.  An adapter says nothing of RoPE: the base has to be loaded
with the config.json that lies beside it, or it is a model of the old window.
"""

import time
from pathlib import Path

import torch

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, staged_directory, write_json, write_text
from endprompt_megatron.convert.lora_merge import longlora_of, merge_of
from endprompt_megatron.convert.model_card import base_name
from endprompt_megatron.convert.peft_start import CONFIG, PREFIX, WEIGHTS
from endprompt_megatron.convert.to_hf import MegatronWeights
from endprompt_megatron.convert.to_megatron import Written
from endprompt_megatron.model.families import EMBEDDING, FAMILIES
from endprompt_megatron.model.shape import shape_of

_CARD = """---
library_name: peft
base_model: {base}
---

# LoRA adapter: {base} extended to {window} tokens

The RoPE of the extension is in `config.json`, not in the adapter: load the base with it.

```python
config = AutoConfig.from_pretrained(ADAPTER)
base = AutoModelForCausalLM.from_pretrained("{base}", config=config)
model = PeftModel.from_pretrained(base, ADAPTER)
```
"""


def convert_megatron_to_peft(megatron: Path, out: Path, iteration: int | None = None) -> Written:
    """Write the adapters of a checkpoint to `out`, with config.json, tokenizer files and a card.

    Memory is that of the adapters and what was trained beside them.  Raises InputError for a checkpoint without any.
    """
    from safetensors.torch import save_file

    started = time.monotonic()
    source = layout.find_checkpoint(Path(megatron), iteration)
    manifest, longlora = layout.read_manifest(source), longlora_of(source)
    hf = source / layout.HF_DIRECTORY
    config = read_json(hf / "config.json", "a Hugging Face config")
    shape = shape_of(config, str(hf / "config.json"))
    merge = merge_of(Checkpoint(source), shape)
    if merge is None:
        raise InputError(
            f"--adapter: {source} holds no LoRA adapters (longlora.rank is 0); export the model without it"
        )
    tensors = {}
    for matrix in merge.adapters:
        a, b = merge.factors(matrix)
        module = PREFIX + matrix.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    beside = _trained_beside(MegatronWeights(source, torch.float32), longlora, shape.family)
    tensors |= {PREFIX + key: value for key, value in beside.items()}
    targets = sorted({matrix.split(".")[-2] for matrix in merge.adapters})
    base, name = base_name(manifest)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": longlora["rank"],
        "lora_alpha": longlora["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": sorted({key.split(".")[-2] for key in beside}) or None,
        "inference_mode": True,
    }
    with staged_directory(Path(out)) as staging:
        save_file(tensors, staging / WEIGHTS, {"format": "pt"})
        write_json(staging / CONFIG, described)
        layout.copy_hf_files(hf, staging)
        write_text(staging / "README.md", _CARD.format(base=name, window=shape.window))
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Written(Path(out), len(tensors), total, "float32", time.monotonic() - started)


def _trained_beside(weights: MegatronWeights, longlora: dict, family: str) -> dict[str, torch.Tensor]:
    """Embeddings and norms, by Hugging Face's name, where the recipe trained them."""
    embedding = FAMILIES[family].hf_name(EMBEDDING)
    wanted = [
        name
        for name in weights.places
        if ("norm" in name.split(".")[-2] and longlora.get("train_norms", True))
        or (name == embedding and longlora.get("train_embeddings", True))
    ]
    found = {}
    for name in wanted:
        mapped, index = weights.places[name]
        rows = torch.cat([part.reshape(-1, *mapped.hf[index][1][1:]).clone() for part in weights.rows(name)])
        found[name] = rows.reshape(mapped.hf[index][1])
    return found
