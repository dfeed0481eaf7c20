"""A dry run as text: memory beside the plan, traffic by group, what the host waits for."""

from dataclasses import asdict
from pathlib import Path

from endprompt_megatron.dry_run.rank_step import Step
from endprompt_megatron.dry_run.target import Target

_LINES = 12  # of what the host reads


def as_dict(step: Step, target: Target) -> dict:
    """For JSON."""
    traffic = [
        {"operation": operation, "group": group, "count": count, "bytes": size}
        for (operation, group), (count, size) in step.traffic.items()
    ]
    syncs = [{"kind": kind, "line": line, "count": n} for (kind, line), n in step.syncs.most_common()]
    return {**asdict(step), "traffic": traffic, "syncs": syncs, "planned": target.planned[step.stage].as_dict()}


def page(step: Step, target: Target) -> str:
    p, planned = target.recipe.parallel, target.planned[step.stage]
    lines = [
        f"{Path(target.recipe.model.hf).name}, rank {step.rank} of {step.world_size}: TP{p.tensor} PP{p.pipeline} "
        f"CP{p.context}, stage {step.stage}, {'+'.join(map(str, step.layers))} layers",
        f"{step.micro_batches} micro-batches; this dry run took {step.seconds:.0f} s",
        "",
        f"  {'':<32}{'this rank':>18}{'planned':>18}",
        f"  {'parameters':<32}{step.parameters:>18,}{planned.parameters:>18,}",
        f"  {'FLOPs of matrix products':<32}{step.flops:>18.4e}",
        f"  {'before the step':<32}{_gib(step.built):>18}",
        f"  {'peak of forward and backward':<32}{_gib(step.backward_peak):>18}",
        f"  {'state that the update makes':<32}{_gib(step.state):>18}",
        f"  {'peak of every later step':<32}{_gib(step.peak):>18}{_gib(planned.allocated):>18}",
        "",
        f"  {step.buckets} buckets of gradients.  Collectives, sends and receives:",
    ]
    for (operation, group), (count, size) in step.traffic.items():
        lines.append(f"    {operation:<32}{group:<24}{count:>7}{_gib(size):>16}")
    lines += ["", f"  What the host reads from the device in forward and backward: {sum(step.syncs.values())}"]
    lines += [f"    {count:>6}  {kind:<6} {line}" for (kind, line), count in step.syncs.most_common(_LINES)]
    if step.elsewhere:
        lines += ["", f"  Not on the model's device: {', '.join(step.elsewhere)}"]
    return "\n".join(lines)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.3f} GiB"
