"""Run by vLLM's Python: what vllm_engine.py answers, asked as tests/engines/test_other_engines.py says.

python vllm_asked.py MODEL ASKED.json OUT.json
"""

import json
import os
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from endprompt_megatron.common.errors import InputError
    from endprompt_megatron.evaluate.engines.base import Prompt
    from endprompt_megatron.evaluate.engines.vllm_engine import VllmEngine

    model, asked, out = sys.argv[1:]
    asked = json.loads(Path(asked).read_text())
    engine = VllmEngine(Path(model), dtype="float32", longest=asked["longest"])
    tokens = np.asarray(asked["tokens"])
    losses, correct = engine.token_losses(tokens, last=asked["last"])
    answer = engine.answer(asked["prompts"][0], asked["expected"], 6)
    prompts = [Prompt(ids, 4 + number) for number, ids in enumerate(asked["prompts"])]
    together = {prompts.index(prompt): generated for prompt, generated in engine.generate_all(iter(prompts))}
    try:
        engine.token_losses(tokens, np.tile(np.arange(tokens.shape[1]) + 1, (len(tokens), 1)))
        refused = ""
    except InputError as error:
        refused = str(error)
    engine.end_ids = {answer.generated[3]}
    found = {
        "losses": losses.tolist(),
        "correct": correct.tolist(),
        "generated": answer.generated,
        "logprobs": answer.logprobs.tolist(),
        "ranks": answer.ranks.tolist(),
        "together": [together[number] for number in range(len(prompts))],
        "refused": refused,
        "ended": engine.generate(asked["prompts"][0], 6),
        "described": engine.describe(),
    }
    Path(out).write_text(json.dumps(found))
    os._exit(0)  # what vLLM's threads do at the end of the process may abort it


if __name__ == "__main__":
    main()
