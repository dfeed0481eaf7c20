"""An export in transformers 4: the same logits as in transformers 5, inside and beyond the old window.

    pip install --target OLD --no-deps transformers==4.40.2 tokenizers==0.19.1 huggingface_hub==0.25.2 \
        requests urllib3 idna charset-normalizer certifi
    OLDER_TRANSFORMERS=OLD[:ANOTHER...]  pytest tests/engines/test_older_transformers.py

Without the variable the tests are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import scaled_config, small_llama

HERE = Path(__file__).resolve().parent
OLDER = [Path(place) for place in os.environ.get("OLDER_TRANSFORMERS", "").split(os.pathsep) if place]
WINDOW, FACTOR = 64, 4.0
SCALINGS = {
    "linear": {},
    "dynamic": {},
    "ntk": {},
    "none": {},
    "yarn": {},
    "yarn-knobs": {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2},
    "llama3": {},
    "longrope": {"long_factor": [1 + i / 2 for i in range(8)], "short_factor": [1 + i / 20 for i in range(8)]},
}
# The first version that computes a type as transformers 5 does.  Those before 4.43 refuse what they do not know; from
# there to 4.50, YaRN takes the new window for the original one, and LongRoPE never takes its long factors.
SINCE = {"yarn": (4, 51), "yarn-knobs": (4, 51), "longrope": (4, 51), "llama3": (4, 43)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """A small model under the config of each scaling."""
    place, made = tmp_path_factory.mktemp("exports"), {}
    for name, knobs in SCALINGS.items():
        made[name] = hf = small_llama(place / name, max_position_embeddings=WINDOW, tokenizer=False)
        config = json.loads((hf / "config.json").read_text())
        scaled = scaled_config(config, name.partition("-")[0], FACTOR, WINDOW, int(WINDOW * FACTOR), **knobs)
        (hf / "config.json").write_text(json.dumps({**scaled, "torch_dtype": "float32"}))
    return made


def logits(exports: dict[str, Path], length: int, out: Path, place: Path | None = None) -> dict[str, np.ndarray]:
    environment = {**os.environ, **({"PYTHONPATH": str(place)} if place else {})}
    command = [sys.executable, HERE / "older_logits.py", out, str(length), *exports.values()]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(out)
    return {"version": found["version"], **{name: found[str(path)] for name, path in exports.items()}}


@pytest.mark.parametrize("length", [WINDOW // 2, 3 * WINDOW])
@pytest.mark.parametrize("place", OLDER or [None], ids=lambda place: place.name if place else "none-given")
def test_older_transformers_compute_the_exported_rope_or_say_so(exports, tmp_path, place, length):
    if place is None:
        pytest.skip("set OLDER_TRANSFORMERS to directories with older versions")
    older = logits(exports, length, tmp_path / "older.npz", place)
    newer = logits(exports, length, tmp_path / "newer.npz")
    version = tuple(map(int, str(older["version"]).split(".")[:2]))
    assert (4, 33) <= version < (5, 0), "before 4.33 there is no rope_theta"
    for name in SCALINGS:
        if version < SINCE.get(name, (4, 33)):
            assert older[name].dtype.kind == "U" or version >= (4, 43), f"{name} was read by {version}"
            continue
        assert older[name].dtype.kind == "f", f"{name}: {older[name]}"
        np.testing.assert_allclose(older[name], newer[name], rtol=1e-3, atol=1e-4, err_msg=name)
