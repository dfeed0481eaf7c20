"""What a run trains on, told by its content: a checkpoint keeps it, and a run goes on with the same alone.

A dataset that was prepared anew with other texts is another one under the same name; a copy of it, the same under
another.
"""

from endprompt_megatron.common.files import digest_of_some
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.indexed import path_of, read_idx, read_manifest
from endprompt_megatron.data.samples.blend import sources_of


def identity_of(recipe: Recipe) -> list[dict]:
    """For each source of data.train its PREFIX, weight and prompts, and checksums of what it holds.

    `index`: SHA-256 of the .idx.  `tokens`: of some blocks of the .bin, which may be too large to read.  `crc32`: of
    all of it, by suffix, as the manifest has it; None without.  Raises InputError for a dataset that cannot be read.
    """
    return [
        {
            "prefix": source.prefix,
            "weight": source.weight,
            "prompts": None if source.prompts is None else list(source.prompts),
            "index": read_idx(source.prefix).digest,
            "tokens": digest_of_some(path_of(source.prefix, ".bin")),
            "crc32": (read_manifest(source.prefix) or {}).get("crc32"),
        }
        for source in sources_of(recipe.data.train, "data.train")
    ]
