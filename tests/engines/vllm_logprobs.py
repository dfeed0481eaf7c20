"""Run by vLLM's Python: log-probabilities that vLLM gives to given tokens, with nothing of this project imported.

python vllm_logprobs.py MODEL TOKENS.json OUT.json
"""

import json
import os
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    model, tokens, out = sys.argv[1:]
    with open(tokens) as file:
        tokens = json.load(file)
    # One chunk: log-probabilities of a prompt need all of its logits.
    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=len(tokens) + 64,
        max_num_seqs=1,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    given = [found[token].logprob for found, token in zip(answer.prompt_logprobs[1:], tokens[1:], strict=True)]
    with open(out, "w") as file:
        json.dump(given, file)
    os._exit(0)  # what vLLM's threads do at the end of the process may abort it


if __name__ == "__main__":
    main()
