"""vLLM, where it is installed: many prompts at once, on one or several GPUs of a host.

Log probabilities are those of a prompt (`prompt_logprobs`).  vLLM takes no position ids, so the virtual-distance probe
is refused.  Token ids go in and out: vLLM's tokenizer is never used.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.engines.base import (
    Answer,
    Ended,
    Prompt,
    checked_dtype,
    checked_tokens,
    end_ids,
)
from endprompt_megatron.model.shape import read_shape

TOGETHER = 64  # prompts handed over before the first of them is finished; vLLM schedules them as memory allows


class VllmEngine:
    """A Hugging Face directory in vLLM.  `longest`: tokens of the longest input, answer included."""

    def __init__(
        self, directory: Path, *, dtype: str = "bfloat16", tensor: int = 1, longest: int | None = None
    ) -> None:
        """Load the model.  Raises InputError if vLLM cannot."""
        checked_dtype(dtype)
        self.directory, self.dtype, self.tensor = directory, dtype, tensor
        self.shape = read_shape(directory)
        self.end_ids = end_ids(directory)
        # Room for the token that vLLM generates even where only the prompt is scored, and for --beyond-window.
        longest = (longest or self.shape.window) + 1
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        started = time.monotonic()
        try:
            from vllm import LLM

            self.llm = LLM(
                str(directory),
                dtype=dtype,
                tensor_parallel_size=tensor,
                max_model_len=longest,
                skip_tokenizer_init=True,
                disable_log_stats=True,
            )
        except Exception as error:  # its worker processes report in many ways
            raise InputError(f"{directory}: vLLM cannot load it ({' '.join(str(error).split())[:200]})") from error
        self.load_seconds = time.monotonic() - started

    def token_losses(
        self, tokens: np.ndarray, position_ids: np.ndarray | None = None, *, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Engine.  Raises InputError for positions other than 0..s-1."""
        tokens = checked_tokens(tokens, self.shape.vocab_size, self.directory)
        if position_ids is not None and not (np.asarray(position_ids) == np.arange(tokens.shape[1])).all():
            raise InputError("--engine vllm: takes no position ids; use --engine transformers or megatron")
        found = self._run([self._params(1, prompt_logprobs=0)] * len(tokens), tokens.tolist())
        columns = [_of_prompt(output, row) for output, row in zip(found, tokens.tolist(), strict=True)]
        logprobs, ranks = (np.stack(values) for values in zip(*columns, strict=True))
        count = logprobs.shape[1] if last is None else min(last, logprobs.shape[1])
        return -logprobs[:, -count:], ranks[:, -count:] == 0

    def generate(self, prompt_ids: list[int], max_new_tokens: int, ended: Ended | None = None) -> list[int]:
        """See Engine.  Goes on after `ended`."""
        return next(self.generate_all([Prompt(prompt_ids, max_new_tokens)]))[1]

    def generate_all(self, prompts: Iterable[Prompt]) -> Iterator[tuple[Prompt, list[int]]]:
        """Every prompt with its continuation as soon as it is finished; see engine.generate_all."""
        engine, under_way = self.llm.llm_engine, {}
        prompts, number = iter(prompts), 0
        more = True
        while more or under_way:
            while more and len(under_way) < TOGETHER:
                prompt = next(prompts, None)
                more = prompt is not None
                if more:
                    checked_tokens(np.asarray([prompt.ids]), self.shape.vocab_size, self.directory)
                    under_way[str(number)] = prompt
                    engine.add_request(
                        str(number), {"prompt_token_ids": list(prompt.ids)}, self._params(prompt.max_new_tokens)
                    )
                    number += 1
            for output in engine.step() if under_way else ():
                if output.finished:
                    yield under_way.pop(output.request_id), self._without_end(output.outputs[0].token_ids)

    def answer(self, prompt_ids: list[int], expected: list[int], max_new_tokens: int) -> Answer:
        """See Engine.  The prompt is read twice: once to go on from it, once with what was expected."""
        both = prompt_ids + expected
        if not expected:
            return Answer(self.generate(prompt_ids, max_new_tokens), np.zeros(0, np.float32), np.zeros(0, np.int64))
        parameters = [self._params(max_new_tokens), self._params(1, prompt_logprobs=0)]
        greedy, forced = self._run(parameters, [prompt_ids, both])
        logprobs, ranks = (values[-len(expected) :] for values in _of_prompt(forced, both))
        return Answer(self._without_end(greedy.outputs[0].token_ids), logprobs, ranks)

    def describe(self) -> dict:
        """What was measured, for results.json."""
        from vllm import __version__

        return {
            "engine": "vllm",
            "vllm": __version__,
            "path": str(self.directory),
            "parameters": self.shape.parameters,
            "window": self.shape.window,
            "dtype": self.dtype,
            "tensor": self.tensor,
            "load_seconds": round(self.load_seconds, 2),
        }

    def _params(self, max_tokens: int, **options: object):
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0, max_tokens=max_tokens, stop_token_ids=sorted(self.end_ids), detokenize=False, **options
        )

    def _run(self, parameters: list, prompts: list[list[int]]) -> list:
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)

    def _without_end(self, generated: Iterable[int]) -> list[int]:
        """vLLM returns the end-of-text token too."""
        ids = list(generated)
        return ids[:-1] if ids and ids[-1] in self.end_ids else ids


def _of_prompt(output: object, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log probability (float32) and rank (0 the likeliest) of every token of a prompt but the first."""
    given = [found[token] for found, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    return (
        np.asarray([each.logprob for each in given], dtype=np.float32),
        np.asarray([each.rank - 1 for each in given], dtype=np.int64),
    )
