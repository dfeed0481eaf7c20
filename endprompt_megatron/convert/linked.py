"""A Hugging Face directory that differs from another only in its config."""

import os
import shutil
from pathlib import Path

from endprompt_megatron.common.files import staged_directory


def with_config(model: Path, config: str, out: Path) -> None:
    """Write `out`: the files of `model` (linked, not copied) beside another config.json.  What was there goes."""
    if out.is_dir():
        shutil.rmtree(out)
    with staged_directory(out) as staging:
        for source in sorted(model.iterdir()):
            if source.is_file() and source.name != "config.json":
                os.symlink(os.path.relpath(source, staging), staging / source.name)
        (staging / "config.json").write_text(config, encoding="utf-8")
