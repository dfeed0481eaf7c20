"""What a rank does to see that Megatron's own model agrees with the conversion: load, run, save in its layout."""

import json
from pathlib import Path
from typing import Any

LAYOUTS = {  # tensor, pipeline, virtual pipeline
    "one-rank": (1, 1, 1),
    "tp2": (2, 1, 1),
    "pp2-vp2": (1, 2, 2),
    "tp2-pp2": (2, 2, 1),
    "pp4": (1, 4, 1),
}


def reload(checkpoint: Path, hf: Path, save: Path, layout: tuple[int, int, int], dtype: str = "float32") -> Any:
    """Load `checkpoint` through the model's sharded state dict, strictly, and save it to `save` in this layout.

    Strictly: a tensor that the model asks for and the checkpoint lacks, or the other way round, is an error.
    Returns tokens int64 [2, 24] and logits float64 [2, 24, v] where one rank holds the whole model, otherwise None.
    """
    import torch

    from endprompt_megatron.config.recipe import LongLora, Parallel, Precision
    from endprompt_megatron.distributed import runtime
    from endprompt_megatron.model.shape import read_shape

    tensor, pipeline, virtual = layout
    launch = runtime.start(tensor, pipeline, virtual, 1, seed=1)
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from endprompt_megatron.model.llama import build_chunks

    shape = read_shape(hf)
    parallel = Parallel(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    config = json.loads((hf / "config.json").read_text())
    models = build_chunks(shape, config, parallel, Precision(dtype=dtype), LongLora(), shared_positions=True)
    state = {f"model{index}": model.sharded_state_dict() for index, model in enumerate(models)}
    state, left, absent = dist_checkpointing.load(state, str(checkpoint), strict=StrictHandling.RETURN_ALL)
    # Transformer Engine's norm has an extra state; a training run saves its optimizer's.
    left = [key for key in map(str, left) if "_extra_state" not in key and not key.startswith("optimizer")]
    assert not left, f"not asked for by the model: {left}"
    assert not absent, f"not in the checkpoint: {absent}"
    for index, model in enumerate(models):
        model.load_state_dict(state[f"model{index}"])

    save.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    # Chunks of a virtual pipeline count their layers from zero: these keys would clash, the stored ones do not.
    merged = {
        f"{index}.{key}": value
        for index, model in enumerate(models)
        for key, value in model.sharded_state_dict().items()
    }
    dist_checkpointing.save(merged, str(save))
    if launch.world_size > 1:
        return None
    tokens = torch.randint(0, shape.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    from float64 import Float64

    with torch.no_grad(), Float64():
        logits = models[0].double()(tokens, torch.arange(24)[None])[..., : shape.vocab_size]
    return tokens.numpy(), logits.numpy()
