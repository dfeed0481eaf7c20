"""Run by a Python that has xllamacpp: log-probabilities that llama.cpp gives to what may follow long prompts.

python llama_cpp_logprobs.py MODEL.gguf TOKENS.json OUT.json
"""

import json
import sys

MOST = 40  # log-probabilities after each prompt


def main() -> None:
    import xllamacpp

    model, tokens, out = sys.argv[1:]
    with open(tokens) as file:
        tokens = json.load(file)
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 0  # the model's own window
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    found = {}
    for length in range(8200, len(tokens) + 1, 100):
        request = {"prompt": tokens[:length], "n_predict": 1, "n_probs": MOST, "temperature": 0.0}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        (step,) = answer["choices"][0]["logprobs"]["content"]
        found[length] = {each["id"]: each["logprob"] for each in step["top_logprobs"]}
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
