"""tools/evaluate.py behind its command line: from options to an evaluation and its printed tables."""

import argparse
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import EXIT_DONE, InputError
from endprompt_megatron.evaluate.engines.base import checked_dtype, checked_engine
from endprompt_megatron.evaluate.settings import BASELINE, EXTENDED, Settings, parse_names, parse_numbers, parse_suites
from endprompt_megatron.evaluate.split import Alone, ModelRanks, parse_part


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises InputError for values that can never be right."""
    given = vars(options)
    plain = (
        *("text", "windows", "scored", "stride", "samples", "filler", "physical", "probe_samples", "template"),
        *("ruler_samples", "haystack", "squad", "hotpotqa", "longbench_data", "limit", "beyond_window", "seed"),
        *("english_words", "punkt", "ruler_seed", "ruler_template", "recall_form", "longbench_e"),
    )

    def numbers(name: str) -> list[int] | None:
        return given[name] and parse_numbers(f"--{name.replace('_', '-')}", given[name])

    settings = Settings(
        suites=parse_suites(options.suite),
        lengths=parse_numbers("--lengths", options.lengths),
        depths=parse_numbers("--depths", options.depths, float),
        needle_lengths=numbers("needle_lengths"),
        distances=numbers("distances"),
        recall_distances=numbers("recall_distances"),
        **{
            name: given[name] and parse_names(given[name]) for name in ("ruler_tasks", "longbench_tasks", "short_tasks")
        },
        dtype=checked_dtype(options.dtype),
        engine=checked_engine(options.engine),
        **{name: given[name] for name in plain},
    )
    for name in ("threads", "tensor", "pipeline"):
        if given[name] is not None and given[name] < 1:
            raise InputError(f"--{name} {given[name]}: should be at least 1")
    settings.check()
    return settings


def models_of(options: argparse.Namespace) -> dict[str, Any]:
    """The models by label, the baseline first.  Raises InputError."""
    from endprompt_megatron.evaluate.preparation import Model, model_at

    if (options.hf is None) == (options.megatron is None):
        raise InputError("--hf: give it, or --megatron RUN/checkpoints with --engine megatron; one of the two")
    if options.megatron is not None and options.engine != "megatron":
        raise InputError(f"--megatron {options.megatron}: is read by --engine megatron; {options.engine} takes --hf")
    if options.megatron is None and options.iteration is not None:
        raise InputError(f"--iteration {options.iteration}: is of --megatron, which is not given")
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
    from endprompt_megatron.evaluate.request_progress import bar
    from endprompt_megatron.evaluate.tables import terminal

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
        with bar(shown=launch.rank == 0) as progress:
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
        print(f"part {part.index}/{part.count} is whole; {options.out} waits for the others")
    return EXIT_DONE


def open_engine(settings: Settings, model: Any, tensor: int) -> Any:
    """The engine that the settings name, with the model's weights.  Raises InputError."""
    if settings.engine == "megatron":
        from endprompt_megatron.evaluate.engines.megatron_engine import MegatronEngine

        return MegatronEngine(model.weights, model.config, dtype=settings.dtype)
    if settings.engine == "vllm":
        from endprompt_megatron.evaluate.engines.vllm_engine import VllmEngine

        longest = max(*settings.lengths, *(settings.needle_lengths or ())) if settings.beyond_window else 0
        return VllmEngine(model.weights, dtype=settings.dtype, tensor=tensor, longest=max(longest, model.window))
    from endprompt_megatron.distributed import runtime
    from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine

    return TransformersEngine(Path(model.weights), runtime.device(), dtype=settings.dtype)
