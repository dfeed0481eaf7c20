"""What `data.packing: documents` can be combined with: methods, RoPE, alignment, and what Transformer Engine packs.

What holds for Transformer Engine was read from the sources of 2.9 to 2.18.
"""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import Hardware
from endprompt_megatron.method.positions import MAPS

# The Transformer Engine from which each exchange of keys and values takes packed sequences.
_PACKED_COMM = {"p2p": (2, 9), "a2a": (2, 10), "all_gather": (2, 18)}


def check_packing(recipe: Recipe, where: str, hardware: Hardware) -> None:
    """Raise InputError for what packed documents cannot be combined with; the line names what they can.

    FP8 attention is refused with the other rules of its precision.
    """
    d, c, p = recipe.data, recipe.context, recipe.parallel
    if d.packing == "stream":
        if d.align is not None:
            raise InputError(f"{where}: data.align={d.align} applies only to data.packing=documents: leave it out")
        return
    asked = f"{where}: data.packing=documents"
    if d.document_ends != "cross":
        raise InputError(f"{asked} with data.document_ends={d.document_ends}: no sample crosses an end; leave it out")
    if c.content_skip:
        raise InputError(f"{asked} with context.content_skip=true: only a stream has it; use packing=stream")
    if c.recall.tokens:
        raise InputError(
            f"{asked} with context.recall.tokens={c.recall.tokens}: a short document has no span to recall; "
            "use packing=stream"
        )
    if MAPS[c.method].whole_window:
        raise InputError(
            f"{asked} with context.method={c.method}: a document need not be as long as the target; use "
            f"method=short with physical={c.target}, or packing=stream"
        )
    if c.physical % d.align:
        raise InputError(f"{where}: context.physical={c.physical} should be a multiple of data.align={d.align}")
    if p.context > 1 and d.align % (2 * p.context):
        raise InputError(
            f"{where}: data.align={d.align} should be a multiple of 2 x parallel.context={2 * p.context}: each rank "
            "takes two chunks of every sample"
        )
    if hardware.gpu is None or hardware.te is None:
        return
    if recipe.precision.dtype == "float32":
        raise InputError(
            f"{asked} with precision.dtype=float32: Transformer Engine has packed attention in BF16 only; use bfloat16"
        )
    minimum = _PACKED_COMM.get(p.context_comm, (0,))
    if p.context > 1 and hardware.te < minimum:
        found, needed = (".".join(map(str, version)) for version in (hardware.te, minimum))
        raise InputError(
            f"{asked} with parallel.context_comm={p.context_comm} needs Transformer Engine {needed}, this is {found}: "
            "use p2p"
        )
