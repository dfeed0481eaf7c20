"""The training loop.  Read it top to bottom and you know what a run does.

Build, resume, then for every step: batch, forward and backward, update, log, maybe validate, maybe save,
maybe stop.  Everything that is about devices, files or formats is a call.
"""

import time
from functools import partial
from pathlib import Path

from endprompt_megatron.checkpoint.run_state import Progress, RunState
from endprompt_megatron.common.errors import EXIT_DONE, EXIT_RESUMABLE, InputError, TrainingError
from endprompt_megatron.config.constraints.check import check
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.config.resolve import config_of_base, config_to_export
from endprompt_megatron.distributed import runtime, te
from endprompt_megatron.distributed.environment import set_before_cuda
from endprompt_megatron.distributed.hardware import here
from endprompt_megatron.distributed.run_lock import RunLock
from endprompt_megatron.distributed.signals import StopSignal
from endprompt_megatron.distributed.watchdog import Watch, group_seconds
from endprompt_megatron.model.shape import ModelShape


def train(recipe: Recipe, where: str, stop: StopSignal) -> int:
    """Run a recipe to its end, or until `stop`; returns the exit code (0 done, 75 stopped and resumable).

    Raises InputError before anything is built if the recipe cannot work, and TrainingError if the loss or
    the gradients stay non-finite.
    """
    launch = runtime.launched_as()
    variables = set_before_cuda(recipe, where)
    shape = check(recipe, where, world_size=launch.world_size)
    variables |= te.set_environment(recipe, where, here())
    if variables and launch.rank == 0:
        print("set " + " ".join(f"{name}={value}" for name, value in variables.items()), flush=True)
    p, timeout = recipe.parallel, group_seconds(recipe.train.watchdog_floor_s)
    runtime.start(p.tensor, p.pipeline, p.virtual_pipeline, p.context, recipe.train.seed, timeout=timeout)
    if recipe.train.deterministic:
        runtime.repeat_exactly()
    with runtime.ended_together(), RunLock(recipe.run_dir):
        return _train(recipe, where, shape, stop)


def _train(recipe: Recipe, where: str, shape: ModelShape, stop: StopSignal) -> int:
    # Here, since these import Megatron and so Transformer Engine, which reads its environment on import.
    from endprompt_megatron.checkpoint.resume import initialise, resume
    from endprompt_megatron.checkpoint.save import Saver, require_disk_space
    from endprompt_megatron.convert.direct import weights_to_start_from
    from endprompt_megatron.convert.exported_files import exported_files
    from endprompt_megatron.convert.exports import Exports
    from endprompt_megatron.convert.over_base import base_to_record, base_weights
    from endprompt_megatron.convert.peft_start import adapter_to_start_from
    from endprompt_megatron.data.samples.feed import open_feed
    from endprompt_megatron.data.samples.terminal_segments import positions_are_shared
    from endprompt_megatron.model.llama import build_model
    from endprompt_megatron.training.metrics import Recorder
    from endprompt_megatron.training.optimizer import (
        build_optimizer,
        complete_parameters,
        update,
        wrap_models,
        zero_grad,
    )
    from endprompt_megatron.training.retention import Retention
    from endprompt_megatron.training.step import run_batch
    from endprompt_megatron.training.validation import Validation

    t = recipe.train
    export_config = config_to_export(recipe, shape, where)
    feed = open_feed(recipe, where, shape.vocab_size)
    te.share_buffers(recipe, shape)
    models = build_model(shape, recipe, export_config, shared_positions=positions_are_shared(recipe))
    models = wrap_models(models, recipe.parallel, recipe.precision)
    optimizer, scheduler = build_optimizer(models, recipe.optim, recipe.precision, recipe.train.steps)
    state = RunState(models, optimizer, scheduler, feed.identity, base_to_record(recipe))

    checkpoints = recipe.run_dir / "checkpoints"
    require_disk_space(checkpoints, shape, recipe.longlora, recipe.precision.dtype)
    progress = resume(checkpoints, recipe, where, state, partial(base_weights, also=recipe.model.init_from))
    if progress is None:
        if recipe.model.init_from is None:
            raise InputError(
                f"{where}: model.init_from is missing; give what tools/convert_hf_to_megatron.py wrote, or the "
                "directory of model.hf"
            )
        weights = weights_to_start_from(Path(recipe.model.init_from), shape, f"{where}: model.init_from")
        adapter = adapter_to_start_from(recipe.longlora, shape, where)
        initialise(weights, models, optimizer, adapter, adapter.keys if adapter else ())
        progress = Progress()
    retention = None
    if recipe.context.retain.weight:
        retention = Retention(recipe, shape, config_of_base(recipe))
        base = weights_to_start_from(Path(recipe.model.init_from), shape, f"{where}: model.init_from")
        initialise(base, retention.models, None)
    exports = Exports(checkpoints, recipe.checkpoint.export_every)
    if progress.step >= t.steps:
        runtime.print_rank_zero(f"{checkpoints}: all {t.steps} steps are done already")
        exports.finish()
        return EXIT_DONE

    def save() -> None:
        with complete_parameters(models):
            saver.save(progress)
        if runtime.is_rank_zero():
            feed.write_consumed(recipe.run_dir, progress.consumed_samples)

    def validate() -> None:
        with complete_parameters(models):
            recorder.validated(progress.step, validation.run())

    files = exported_files(recipe, export_config, where)
    saver = Saver(checkpoints, recipe, files, state, progress.step, spared=exports.due)
    recorder = Recorder(recipe, shape, progress)
    validation = Validation(recipe, feed, models) if feed.valid is not None else None
    if t.valid_interval and progress.step == 0:
        validate()
    watch = Watch(
        recipe.run_dir,
        interval=t.straggler_interval,
        factor=t.watchdog_factor,
        floor=t.watchdog_floor_s,
        report=lambda values, line: recorder.noted(progress.step, values, line),
    )
    nonfinite = 0
    with recorder, saver, watch:
        while progress.step < t.steps:
            started = time.perf_counter()
            watch.step_begins(progress.step + 1)
            batch = feed.global_batch(progress.consumed_samples)
            watch.batch_read()

            zero_grad(models, optimizer)
            if retention is not None:
                batch = retention.added_to(batch, progress.step)
            losses = run_batch(models, batch, backward=True, watch=watch, retention=retention)
            lr = optimizer.param_groups[0]["lr"]
            grad_norm, updated = update(optimizer, losses.total, recipe.optim.grad_clip)
            scheduler.step(increment=1)

            runtime.collect_garbage(progress.step, t.gc_interval)
            progress.step += 1
            progress.consumed_samples += t.global_batch_size
            nonfinite = 0 if updated else nonfinite + 1
            recorder.stepped(progress, losses, grad_norm, lr, time.perf_counter() - started, skipped=not updated)
            if nonfinite >= t.max_nonfinite_steps:
                raise TrainingError(
                    f"{where}: loss or gradients were not finite for {nonfinite} steps in a row, the last at step "
                    f"{progress.step} (loss {losses.total}, gradient norm {grad_norm}); the newest checkpoint is of "
                    f"step {saver.newest}: lower optim.lr or look at the data from there"
                )

            last = progress.step == t.steps
            signal_number = runtime.agreed(stop)
            saver.poll()
            watch.step_ends()
            if last or signal_number or progress.step % recipe.checkpoint.interval == 0:
                save()  # before anything that could take the time that a scheduler leaves
                exports.go_on()
            if last or signal_number:
                saver.wait()
            if signal_number and not last:
                recorder.say(f"stopped by signal {signal_number} at step {progress.step}; run again to continue")
                return EXIT_RESUMABLE
            if validation and (last or (t.valid_interval and progress.step % t.valid_interval == 0)):
                validate()
    exports.finish()
    return EXIT_DONE
