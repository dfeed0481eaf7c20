"""Logits of models, by whichever transformers this Python finds: `older_logits.py OUT.npz LENGTH MODEL...`.

A model that it refuses has the reason instead.  No import of ours: older versions run beside the tests' own.
"""

import sys

import numpy as np
import torch
import transformers


def logits(directory: str, length: int) -> np.ndarray:
    model = transformers.LlamaForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
    ids = torch.arange(length)[None] * 7 % 290 + 3
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0].numpy()


def main() -> None:
    out, length, *models = sys.argv[1:]
    found = {"version": np.array(transformers.__version__)}
    for model in models:
        try:
            found[model] = logits(model, int(length))
        except Exception as error:  # of every kind, and what is looked for
            found[model] = np.array(f"{type(error).__name__}: {error}"[:300])
    np.savez(out, **found)


if __name__ == "__main__":
    main()
