"""What a run reports: metrics.jsonl, TensorBoard, W&B, a progress bar or plain lines.

Only rank 0 writes.  A resumed run continues the same files, after lines past the checkpoint are removed.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.run_state import Progress
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import write_text
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.runtime import is_rank_zero, peak_flops, peak_memory_gib, world_size
from endprompt_megatron.model.flops import flops_per_token
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.training.step import Losses


class Recorder:
    """Context manager around the loop; every method may be called on every rank."""

    def __init__(self, recipe: Recipe, shape: ModelShape, progress: Progress) -> None:
        self.recipe = recipe
        self.writing = is_rank_zero()
        self.skipped = 0
        self.gpus = world_size()
        self.flops_per_token = flops_per_token(shape, recipe.context.physical, recipe.longlora)
        self.file = self.board = self.wandb = self.bar = None
        if not self.writing:
            return
        run = recipe.run_dir
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "recipe.yaml", recipe.as_yaml())
        cut_metrics(run / "metrics.jsonl", progress.step)
        self.file = open(run / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if recipe.log.tensorboard:
            self.board = _tensorboard(run / "tensorboard", progress.step)
        if recipe.log.wandb:
            self.wandb = _wandb(recipe, run)
        for lost in progress.lost:  # printed when the run resumed; the lines of those steps are removed by now
            self._write({"step": progress.step, "damaged_checkpoint": lost}, progress.step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=recipe.train.steps, initial=progress.step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for resource in (self.bar, self.board, self.file):
            if resource is not None:
                resource.close()
        if self.wandb is not None:
            self.wandb.finish()

    def stepped(
        self, progress: Progress, losses: Losses, grad_norm: float, lr: float, seconds: float, skipped: bool
    ) -> None:
        """Record a step.  `seconds` is the wall time of the complete step."""
        self.skipped += skipped
        if not self.writing:
            return
        step, steps = progress.step, self.recipe.train.steps
        tokens = self.recipe.tokens_per_step
        flops = self.flops_per_token * tokens / seconds / self.gpus
        peak = peak_flops()
        values = {
            "step": step,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_samples * self.recipe.context.physical,
            "loss": losses.total,
            "loss_context": losses.context,
            "loss_prompt": losses.prompt,
            **({} if losses.retained is None else {"loss_retained": losses.retained}),
            "targets": losses.targets,
            "grad_norm": grad_norm,
            "lr": lr,
            "step_time_s": seconds,
            "tokens_per_s": tokens / seconds,
            "tflops_per_gpu": flops / 1e12,
            "mfu": flops / peak if peak else None,
            "memory_gib": peak_memory_gib(),
            "processes": self.gpus,
            "skipped_steps": self.skipped,
        }
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(f"loss {losses.total:.4f}, {values['tokens_per_s']:.0f} tokens/s")
        if skipped:
            self.say(f"step {step}: loss {losses.total} or gradient norm {grad_norm} is not finite; update skipped")
        elif step % self.recipe.train.log_interval and step != steps:
            return
        elif self.bar is None:
            prompt = "" if losses.prompt is None else f", prompt {losses.prompt:.4f}"
            prompt += "" if losses.retained is None else f", from the base {losses.retained:.4f}"
            self.say(
                f"step {step}/{steps}  loss {losses.total:.4f} (context {losses.context:.4f}{prompt})  "
                f"grad {grad_norm:.3f}  lr {lr:.2e}  {values['tokens_per_s']:.0f} tokens/s"
            )
        self._write(values, step)

    def validated(self, step: int, values: dict[str, Any]) -> None:
        """Record validation losses and the virtual-distance probe."""
        if not self.writing:
            return
        self._write({"step": step, **values}, step)
        probe = "".join(f", {distance}: {at['loss']:.3f}" for distance, at in values.get("virtual", {}).items())
        self.say(f"step {step}  valid loss {values['valid_loss']:.4f}" + (f"  at distance{probe[1:]}" if probe else ""))

    def noted(self, step: int, values: dict[str, Any], line: str) -> None:
        """Record an event of a step other than its training, and print it."""
        if self.writing:
            self._write({"step": step, **values}, step)
            self.say(line)

    def say(self, line: str) -> None:
        if not self.writing:
            return
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def _write(self, values: dict[str, Any], step: int) -> None:
        # JSON has no NaN: a value that is not finite is written as null.
        self.file.write(json.dumps(_finite(values)) + "\n")
        scalars = dict(_scalars("", values))
        scalars.pop("step", None)
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)


def cut_metrics(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`; remove what a killed run logged after its checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a kill left incomplete
        logged = values.get("step") if isinstance(values, dict) else None
        if isinstance(logged, int) and logged <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(prefix: str, values: dict) -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _scalars(f"{prefix}{key}/", value)
        elif isinstance(value, int | float):
            found.append((prefix + str(key), value))
    return found


def _tensorboard(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("log.tensorboard=true needs the tensorboard package: install it, or set false") from None
    return SummaryWriter(str(directory), purge_step=step + 1)


def _wandb(recipe: Recipe, run: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise InputError(f"log.wandb={recipe.log.wandb} needs the wandb package: install it, or set null") from None
    return wandb.init(project=recipe.log.wandb, name=run.name, dir=str(run), config=recipe.as_dict(), resume="allow")
