"""RULER's questions made by NVIDIA's unmodified scripts and by this project: are they the same, and who is faster?

    python benchmarks/ruler_generation.py --nvidia RULER --python VENV/bin/python --tokenizer HF_DIR --lengths 32768

RULER is a checkout of github.com/NVIDIA/RULER, VENV has what its scripts import: numpy scipy tqdm pyyaml nltk
wonderwords tenacity transformers.  What is compared and how: benchmarks/ruler_generation.md.
"""

import argparse
import ast
import hashlib
import itertools
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli

FILES = {"haystack": "PaulGrahamEssays.json", "squad": "squad.json", "hotpotqa": "hotpotqa.json"}
FILES["english_words"] = "english_words.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvidia", type=Path, metavar="DIR", help="the checkout of NVIDIA/RULER")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs NVIDIA's scripts")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a Hugging Face directory")
    parser.add_argument("--lengths", default="32768", help="with commas; default: 32768")
    parser.add_argument("--tasks", help="with commas; default: all 13, without qa_1 and qa_2 where there is no file")
    parser.add_argument("--samples", type=int, default=50, help="a task; default: 50")
    parser.add_argument("--rounds", type=int, default=1, help="of each side, taking turns; default: 1")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--template", default="base", help="one of NVIDIA's; default: base")
    for name, file in FILES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="FILE", help=file)
    parser.add_argument("--punkt", type=Path, metavar="DIR", help="NLTK's punkt_tab/english, or another")
    parser.add_argument("--golden", type=Path, metavar="FILE", help="add checksums of NVIDIA's samples, and its scores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times here")
    parser.add_argument("--make", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # our side, in its own process
    return parser.parse_args()


def ruler_settings(options: argparse.Namespace):
    from endprompt_megatron.evaluate.suites.ruler import TASKS, RulerSettings

    return RulerSettings(
        lengths=tuple(int(length) for length in options.lengths.split(",")),
        tasks=tuple(options.tasks.split(",")) if options.tasks else tuple(TASKS),
        samples=options.samples,
        seed=options.seed,
        template=options.template,
        punkt=options.punkt,
        **{name: getattr(options, name) for name in FILES},
    )


def make(options: argparse.Namespace) -> None:
    """Our side: one task and length, written as NVIDIA's scripts write theirs."""
    from endprompt_megatron.evaluate.suites.ruler.ruler_suite import prompts
    from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import TASKS
    from endprompt_megatron.evaluate.suites.ruler.templates import template
    from endprompt_megatron.tokenizer import load_tokenizer

    settings = ruler_settings(options)
    [task], [length] = settings.asked, settings.lengths
    made = prompts(settings, load_tokenizer(options.tokenizer), template(settings.template), task, length)
    with open(options.make, "w", encoding="utf-8") as file:
        for sample in made:
            at = sample.text.rfind(TASKS[task].answer_prefix[:10])
            row = {"input": sample.text[:at], "outputs": sample.references, "answer_prefix": sample.text[at:]}
            file.write(json.dumps({**row, "length": len(sample.ids) + TASKS[task].new_tokens}) + "\n")


class Nvidia:
    """A copy of the checkout's scripts with the source files in their places."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        import yaml

        from endprompt_megatron.evaluate.suites.ruler.sources import sources_of

        self.options, self.scratch = options, scratch
        scripts = options.nvidia / "scripts"
        if not (scripts / "data" / "synthetic" / "niah.py").is_file():
            raise InputError(f"--nvidia {options.nvidia}: is no checkout of NVIDIA/RULER")
        self.data = shutil.copytree(scripts, scratch / "scripts") / "data"
        self.yaml = yaml.safe_load((scripts / "synthetic.yaml").read_text())
        settings = ruler_settings(options)
        sources = sources_of(settings)
        folder = self.data / "synthetic" / "json"
        # Whitespace is one to NVIDIA's scripts as well: the words are the essays.
        (folder / FILES["haystack"]).write_text(json.dumps({"text": " ".join(sources.essay_words)}))
        (folder / FILES["english_words"]).write_text(json.dumps(dict(enumerate(sources.english_words))))
        for name in ("haystack", "squad", "hotpotqa", "english_words"):
            if getattr(settings, name) is not None:
                shutil.copy(getattr(settings, name), folder / FILES[name])
        punkt = scratch / "nltk" / "tokenizers" / "punkt_tab" / "english"
        punkt.mkdir(parents=True)
        for name, text in sources.punkt.items():
            (punkt / name).write_text(text, encoding="utf-8")

    def command(self, task: str, length: int) -> list[str]:
        """As scripts/data/prepare.py puts it together, without the shell."""
        sys.path.insert(0, str(self.data))
        from synthetic.constants import TASKS
        from template import Templates

        row = self.yaml[task]
        base = TASKS[row["task"]]
        form = Templates[self.options.template].format(task_template=base["template"]) + base["answer_prefix"]
        flags = {
            "save_dir": self.scratch / "out",
            "save_name": task,
            "subset": "validation",
            "tokenizer_path": self.options.tokenizer.resolve(),
            "tokenizer_type": "hf",
            "max_seq_length": length,
            "tokens_to_generate": base["tokens_to_generate"],
            "num_samples": self.options.samples,
            "random_seed": self.options.seed,
            **row["args"],
            "template": form,
        }
        script = self.data / "synthetic" / f"{row['task']}.py"
        return [self.options.python, str(script), *(str(each) for name in flags for each in (f"--{name}", flags[name]))]

    def score(self, task: str, rows: list[dict]) -> float:
        """Of `answer` to these samples by NVIDIA's own functions; evaluate.py itself wants NeMo and a command line."""
        folder = self.data.parent / "eval"
        metric = runpy.run_path(str(folder / "synthetic" / "constants.py"))["TASKS"][self.yaml[task]["task"]][
            "metric_fn"
        ]
        tree = ast.parse((folder / "evaluate.py").read_text())
        names: dict = {"re": re}
        [function] = [node for node in tree.body if getattr(node, "name", None) == "postprocess_pred"]
        exec(compile(ast.Module([function], []), "evaluate.py", "exec"), names)
        said = [names["postprocess_pred"](answer(row["outputs"], number), {}) for number, row in enumerate(rows)]
        return metric(said, [row["outputs"] for row in rows])

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "NLTK_DATA": str(self.scratch / "nltk")}


def timed(command: list[str], environment: dict[str, str] | None = None) -> float:
    """Seconds that a process takes."""
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{command[1]} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return time.perf_counter() - started


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def checksum(row: dict) -> str:
    """Of a prompt, its answer prefix, its references and its length in tokens."""
    content = json.dumps([row["input"], row["answer_prefix"], row["outputs"], row["length"]])
    return hashlib.sha256(content.encode()).hexdigest()


def answer(references: list[str], number: int) -> str:
    """Something that a model could have said: all of it, part of it, nothing, or another thing, by turns."""
    said = {
        0: "\n ".join(references),
        1: f"\tIt is\x07{references[0].upper()}.",
        2: "",
        3: ", ".join(references[1:]).lower(),
        4: "I do not know: 1234567, the of and",
    }
    return said[number % len(said)]


def our_score(task: str, rows: list[dict]) -> float:
    """Of `answer` to these samples, in percent."""
    from endprompt_megatron.evaluate.suites.benchmark import Sample
    from endprompt_megatron.evaluate.suites.ruler import score, summary

    scored = []
    for number, row in enumerate(rows):
        question = Sample("ruler", task, 0, number, [], 0, row["outputs"])
        scored.append((question, score(question, answer(row["outputs"], number))))
    return summary(scored)["scores"][task]["0"]


def main() -> None:
    options = arguments()
    if options.make is not None:
        return make(options)
    if options.nvidia is None:
        raise InputError("--nvidia DIR: missing; the checkout of github.com/NVIDIA/RULER to compare with")
    from endprompt_megatron.evaluate.suites.ruler import check

    settings = ruler_settings(options)
    check(settings)  # with more samples than questions NVIDIA's scripts would never end
    times, golden, different = {}, {}, []
    with tempfile.TemporaryDirectory() as directory:
        nvidia, ours = Nvidia(options, Path(directory)), Path(directory) / "ours.jsonl"
        print(f"seconds for {options.samples} samples")
        print(f"{'task':<16} {'length':>7}  {'NVIDIA':>8}  {'ours':>8}  {'ratio':>6}")
        for length, task in itertools.product(settings.lengths, settings.asked):
            spent = times[f"{task}/{length}"] = {"nvidia": [], "ours": []}
            for _ in range(options.rounds):
                spent["nvidia"].append(timed(nvidia.command(task, length), nvidia.environment))
                given = [*sys.argv[1:], "--make", str(ours), "--tasks", task, "--lengths", str(length)]
                spent["ours"].append(timed([sys.executable, str(Path(__file__).resolve()), *given]))
            theirs, made = rows(Path(directory) / "out" / task / "validation.jsonl"), rows(ours)
            checksums, score = list(map(checksum, theirs)), nvidia.score(task, theirs)
            golden[f"{options.template}/{task}/{length}"] = {"samples": checksums, "score": score}
            same = (
                len(checksums) == options.samples
                and list(map(checksum, made)) == checksums
                and our_score(task, made) == score
            )
            if not same:
                different.append(f"{task} at {length}")
            slow, fast = (statistics.median(spent[side]) for side in ("nvidia", "ours"))
            note = "" if same else "   DIFFERENT"
            print(f"{task:<16} {length:>7}  {slow:>8.1f}  {fast:>8.1f}  {slow / fast:>6.2f}{note}", flush=True)
    totals = [
        [sum(spent[side][number] for spent in times.values()) for number in range(options.rounds)]
        for side in ("nvidia", "ours")
    ]
    ratios = [slow / fast for slow, fast in zip(*totals, strict=True)]
    print(
        f"all: NVIDIA {statistics.median(totals[0]):.1f} s, ours {statistics.median(totals[1]):.1f} s, ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {options.rounds} rounds)"
    )
    if options.golden is not None:
        before = json.loads(options.golden.read_text()) if options.golden.exists() else {}
        options.golden.write_text(json.dumps({**before, **golden}, indent=1) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(times, indent=1) + "\n")
    if different:
        raise InputError(f"not the same as NVIDIA's: {', '.join(different)}")
    print(f"the same prompts, answer prefixes, references, lengths and scores: {options.samples * len(times)} samples")


if __name__ == "__main__":
    run_cli(main)
