"""How layers are split over pipeline stages and virtual stages.  Pure arithmetic, identical to Megatron-Core.

Embedding and loss may count as a layer each, so that the first and the last stage, which hold them, get one
transformer layer fewer: with them, the 126 layers of LLaMA-3.1-405B count as 128.
"""

from endprompt_megatron.config.recipe import Parallel


def chunk_layers(num_layers: int, parallel: Parallel) -> list[list[int]]:
    """Transformer layers of each virtual stage of each pipeline stage, [pipeline][virtual].

    Chunk v of stage p is the (v * pipeline + p)-th chunk of the model.  Raises ValueError, naming the number of
    which the counted layers must be a multiple.
    """
    stages, virtual = parallel.pipeline, parallel.virtual_pipeline or 1
    counted = num_layers + parallel.count_embedding + parallel.count_loss
    if counted % (stages * virtual):
        raise ValueError(f"{counted} layers are not a multiple of {stages * virtual}")
    size = counted // (stages * virtual)
    layers = [[size] * virtual for _ in range(stages)]
    layers[0][0] -= parallel.count_embedding
    layers[-1][-1] -= parallel.count_loss
    return layers
