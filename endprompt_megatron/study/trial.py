"""One trial of a study: its directory, which of its stages are done, and the commands of the others.

    STUDY/cells/NAME/cell.json         the recipe as resolved, which stages are done, what they cost
    STUDY/cells/NAME/recipe.yaml, run/ training (tools/extend.py)
    STUDY/cells/NAME/hf/               the trained model (tools/convert_megatron_to_hf.py), or the scaled base
    STUDY/cells/NAME/development/      tools/evaluate.py on development data, where the study chooses
    STUDY/cells/NAME/evaluation/       tools/evaluate.py
    STUDY/cells/NAME/STAGE.log         what the tools printed

A stage is recorded once it is done, and every tool resumes from what it had written, so a kill at any moment costs
only time.  No torch.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, write_json, write_text
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.config.resolve import config_to_export
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.study.grid import Study, Trial, option_text

TRAIN, EXPORT, DEVELOP, EVALUATE = "train", "export", "develop", "evaluate"
_EVALUATIONS = {DEVELOP: "development", EVALUATE: "evaluation"}  # and the directories of their results


@dataclass
class Work:
    """The state of a trial on disk, and its stages up to `last`: an evaluation on development data or the last one."""

    study: Study
    trial: Trial
    last: str = EVALUATE

    def __post_init__(self) -> None:
        """Raises InputError if a file of the directory is broken."""
        self.directory = self.study.directory(self.trial)
        self.path = self.directory / "cell.json"
        self.state = {"format": 1, "name": self.trial.name, "stages": {}, "cost": {}}
        if self.path.exists():
            self.state = read_json(self.path, "the record of a trial")

    @property
    def recipe(self) -> dict | None:
        """The recipe without the directory of the run, which may be moved."""
        return None if self.trial.recipe is None else _without_directory(self.trial.recipe)

    @property
    def stages(self) -> list[str]:
        """The stages that the trial has."""
        return [TRAIN, EXPORT, self.last] if self.trial.trained else [self.last]

    def is_done(self, stage: str) -> bool:
        """Whether a stage is recorded, for these very settings."""
        record = self.state["stages"].get(stage)
        if record is None:
            return False
        return stage not in _EVALUATIONS or record["options"] == self.options_of(stage)

    @property
    def left(self) -> list[str]:
        """The stages that are not done."""
        return [stage for stage in self.stages if not self.is_done(stage)]

    @property
    def results(self) -> Path:
        """The directory of the last stage's results."""
        return self.directory / _EVALUATIONS[self.last]

    def options_of(self, stage: str) -> dict:
        """Options of an evaluation, in the form in which they are compared and stored."""
        options = self.study.choose.evaluation if stage == DEVELOP else self.study.evaluation
        return json.loads(json.dumps(options))

    @property
    def model(self) -> Path:
        """The Hugging Face directory to evaluate."""
        return self.trial.model if self.trial.recipe is None else self.directory / "hf"

    def refuse_changed(self) -> None:
        """Raise InputError if the trial had another recipe, or must be evaluated again and its model is gone."""
        where = f"{self.study.path}: trial {self.trial.name}"
        way_out = "revert it, choose another out, or give --again to run the trial anew"
        if "recipe" in self.state:
            changed = _difference(self.state["recipe"], self.recipe)
            if changed:
                raise InputError(f"{where} was run with {changed}; {way_out}")
        evaluated = self.state["stages"].get(self.last)
        if evaluated and self.trial.trained and not self.is_done(self.last) and not self.model.is_dir():
            changed = _difference(evaluated["options"], self.options_of(self.last))
            raise InputError(f"{where} was evaluated with {changed}, and keep: scores has removed its model; {way_out}")
        exported = self.trial.trained and EXPORT in self.state["stages"]
        if exported and self.last == EVALUATE and evaluated is None and not self.model.is_dir():
            raise InputError(f"{where} was not chosen before, and keep: scores has removed its model; {way_out}")

    def begin(self) -> None:
        """Create the directory, and record what the trial is."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.state |= {"row": self.trial.variant, "levels": self.trial.levels, "trained": self.trial.trained}
        self.state["recipe"] = self.recipe
        if self.trial.recipe is not None:
            write_text(self.directory / "recipe.yaml", self.trial.recipe.as_yaml())
        self.write()

    def write(self) -> None:
        """Write the record."""
        write_json(self.path, self.state)

    def forget(self) -> None:
        """Remove everything of the trial."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.__post_init__()

    def command(self, stage: str) -> list[str] | None:
        """The tool and its arguments; None where nothing is left to run."""
        if stage == TRAIN:
            processes = ["--processes", str(self.study.processes)] if self.study.processes > 1 else []
            return ["extend.py", str(self.directory / "recipe.yaml"), *processes]
        if stage == EXPORT:
            if self.model.is_dir():  # complete, but the runner was killed before it recorded that
                return None
            return [
                *["convert_megatron_to_hf.py", "--megatron", str(self.directory / "run" / "checkpoints")],
                *["--out", str(self.model), "--workers", "1"],
            ]
        command = ["evaluate.py", "--hf", str(self.model), "--out", str(self.directory / _EVALUATIONS[stage])]
        for name, value in self.options_of(stage).items():
            if value is None or value is False:
                continue
            command.append(f"--{name.replace('_', '-')}")
            command += [] if value is True else [option_text(value)]
        return command

    def prepare(self, stage: str) -> None:
        """Create what a stage's command requires."""
        if stage in _EVALUATIONS and not self.trial.trained and self.trial.recipe is not None:
            interpolate(self.trial.recipe, self.model)

    def finish(self, stage: str, seconds: float, cpu_seconds: float) -> None:
        """Record a stage as done, and clean up after the last one."""
        record = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
        if stage == TRAIN:
            self.state["cost"] |= training_cost(self.directory / "run" / "metrics.jsonl")
        if stage in _EVALUATIONS:
            record["options"] = self.options_of(stage)
        self.state["stages"][stage] = record
        self.write()
        if stage == EVALUATE:
            self.clean()

    def spent(self, stage: str, seconds: float, cpu_seconds: float) -> tuple[float, float]:
        """Seconds of this attempt at a stage and of earlier, interrupted ones; recorded until the stage is done."""
        earlier = self.state.setdefault("attempts", {}).get(stage, [0.0, 0.0])
        total = (earlier[0] + seconds, earlier[1] + cpu_seconds)
        self.state["attempts"][stage] = [round(value, 2) for value in total]
        self.write()
        return total

    def clean(self) -> None:
        """With `keep: scores`, remove the checkpoints and the model of a trial that needs them no more."""
        if self.study.keep == "scores" and not self.left:
            for name in ("run/checkpoints", "run/index", "run/tensorboard", "hf"):
                shutil.rmtree(self.directory / name, ignore_errors=True)


def interpolate(recipe: Recipe, out: Path) -> None:
    """Write `out`: the base model's weights, linked, under the config that training by `recipe` would export."""
    from endprompt_megatron.convert.linked import with_config

    model = Path(recipe.model.hf)
    config = config_to_export(recipe, read_shape(model), "untrained")
    with_config(model, json.dumps(config, indent=2) + "\n", out)


def training_cost(metrics: Path) -> dict:
    """Tokens, steps, seconds in steps, tokens a second (median) and peak memory, from a run's metrics.jsonl."""
    steps = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "step_time_s" in values:
            steps.append(values)
    times = sorted(values["step_time_s"] for values in steps)
    rates = sorted(values["tokens_per_s"] for values in steps)
    last = steps[-1]
    return {
        "tokens": last["consumed_tokens"],
        "samples": last["consumed_samples"],
        "steps": last["step"],
        # Where only some steps are logged, the others are assumed to take as long.
        "step_seconds": round(sum(times) / len(times) * last["step"], 3),
        "tokens_per_s": round(rates[len(rates) // 2], 1),
        "memory_gib": round(max(values["memory_gib"] for values in steps), 3),
    }


def _without_directory(recipe: Recipe) -> dict:
    value = json.loads(json.dumps(recipe.as_dict()))
    del value["checkpoint"]["dir"]
    return value


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {key: each for name, inner in value.items() for key, each in _flat(inner, f"{prefix}{name}.").items()}


def _difference(old: dict | None, new: dict | None) -> str | None:
    """The first key that differs, in words.  A key that came with a later version had its default before."""
    defaults = _flat(Recipe().as_dict())
    before, now = _flat(old or {}), _flat(new or {})
    for key in {**before, **now}:
        was, is_ = (side[key] if key in side else defaults.get(key) for side in (before, now))
        if was != is_:
            return f"{key}={json.dumps(was)}, which is now {json.dumps(is_)}"
    return None
