"""tools/evaluate.py behind its command line: from options to an evaluation and its printed tables."""

import argparse
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import EXIT_DONE, InputError
from endprompt_megatron.evaluate.options import parse_lengths
from endprompt_megatron.evaluate.registry import BASELINE, EXTENDED, SUITES, Settings, all_options, parse_suites
from endprompt_megatron.evaluate.split import Alone, ModelRanks, parse_part


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises InputError for values that can never be right."""
    settings = Settings(
        suites=parse_suites(options.suite),
        lengths=parse_lengths("--lengths", options.lengths),
        **{name: option.value(options) for name, option in all_options().items()},
    )
    for name in ("threads", "tensor", "pipeline"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: should be at least 1")
    settings.check()
    return settings


def models_of(options: argparse.Namespace) -> dict[str, Any]:
    """The models by label, the baseline first.  Raises InputError."""
    from endprompt_megatron.evaluate.preparation import Model, model_at

    if (options.hf is None) == (options.megatron is None):
        raise InputError("--hf: give either it, or --megatron RUN/checkpoints with --engine megatron")
    if options.megatron is not None and options.engine != "megatron":
        raise InputError(f"--megatron {options.megatron}: needs --engine megatron; {options.engine} takes --hf")
    if options.megatron is None and options.iteration is not None:
        raise InputError(f"--iteration {options.iteration}: applies only to --megatron, which is not given")
    extended = model_at(options.megatron, options.iteration) if options.megatron else Model(options.hf, options.hf)
    if options.baseline is None:
        return {EXTENDED: extended}
    return {BASELINE: Model(options.baseline, options.baseline), EXTENDED: extended}


def run(options: argparse.Namespace) -> int:
    """Evaluate and print; returns the exit code.  Raises InputError."""
    settings, models, part = settings_of(options), models_of(options), parse_part(options.part)
    import torch

    from endprompt_megatron.distributed import runtime
    from endprompt_megatron.evaluate.evaluation import evaluate
    from endprompt_megatron.evaluate.request_progress import RequestProgress
    from endprompt_megatron.evaluate.terminal import terminal

    runtime.quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    launch = runtime.launched_as()
    if settings.engine == "megatron" and not options.merge:
        from endprompt_megatron.evaluate.engines import megatron_engine

        megatron_engine.start(options.tensor, options.pipeline, models[EXTENDED].config)
        ranks = ModelRanks(part)
    elif settings.engine == "vllm":
        # One process drives all of its GPUs.
        ranks = Alone(part.split(launch.rank, launch.world_size))
    else:
        runtime.take_device(launch)
        ranks = Alone(part.split(launch.rank, launch.world_size))
    try:
        with RequestProgress(shown=launch.rank == 0) as progress:
            results = evaluate(
                settings,
                models,
                options.out,
                lambda model: open_engine(settings, model, options.tensor),
                ranks=ranks,
                progress=progress,
                merge=options.merge,
            )
    finally:
        if settings.engine == "megatron":
            runtime.finish()
    if results is not None:
        print(terminal(results))
        print(f"\n{results['seconds']:.0f} s; {options.out / 'results.json'} and the plots beside it")
    elif ranks.first and part.count > 1:
        print(f"part {part.index}/{part.count} is complete; {options.out} waits for the others")
    return EXIT_DONE


def open_engine(settings: Settings, model: Any, tensor: int) -> Any:
    """The engine that the settings name, with the model's weights.  Raises InputError."""
    if settings.engine == "megatron":
        from endprompt_megatron.evaluate.engines.megatron_engine import MegatronEngine

        return MegatronEngine(model.weights, model.config, dtype=settings.dtype)
    if settings.engine == "vllm":
        from endprompt_megatron.evaluate.engines.vllm_engine import VllmEngine

        lengths = [SUITES[suite].real_lengths(settings).values() for suite in settings.suites]
        beyond = [length for of_suite in lengths for each in of_suite for length in each]
        longest = max(beyond, default=0) if settings.beyond_window else 0
        return VllmEngine(model.weights, dtype=settings.dtype, tensor=tensor, longest=max(longest, model.window))
    from endprompt_megatron.distributed import runtime
    from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine

    return TransformersEngine(Path(model.weights), runtime.device(), dtype=settings.dtype)
