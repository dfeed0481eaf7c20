"""The model's files: Hugging Face weights whole, the converted checkpoint whole, the tokenizer the model's.

Nothing is loaded: a safetensors file says in its header how long it is (a .bin file in its list), a torch_dist
checkpoint in its metadata which bytes of which file hold what.
"""

import json
import math
import pickle
import struct
from dataclasses import replace
from pathlib import Path

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.common.units import format_bytes
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.hf_weights import INDEX, OLD_INDEX, OLD_SINGLE, SINGLE
from endprompt_megatron.data.samples.blend import prompts_used
from endprompt_megatron.data.samples.terminal_segments import recall_of
from endprompt_megatron.method.positions import MAPS, copies, segment_lengths
from endprompt_megatron.method.prompts import tokenise_prompts
from endprompt_megatron.model.shape import ModelShape, read_shape
from endprompt_megatron.preflight.table import FAIL, OK, WARN, Finding, many, some
from endprompt_megatron.tokenizer.vocabulary import check_vocabulary

HF, CONVERTED, TOKENIZER = "HF checkpoint", "converted checkpoint", "tokenizer"
_BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "F16": 2, "BF16": 2}


def hf_checkpoint(recipe: Recipe, shape: ModelShape) -> Finding:
    """Every shard there, as long as its header says, and holding what config.json promises.

    Training needs no weights here once they are converted: then their absence is a warning.
    """
    directory = Path(recipe.model.hf)
    files = _shards(directory)
    if not files and converted_at(recipe) is not None:
        return Finding(HF, f"{directory}: config and tokenizer alone; its weights are converted already", WARN)
    return _of_files(HF, directory, files, shape)


def _of_files(check: str, directory: Path, files: list[str], shape: ModelShape) -> Finding:
    if not files:
        raise InputError(f"{directory}: no {SINGLE} and no {INDEX}; is the download complete?")
    missing = [name for name in files if not (directory / name).is_file()]
    damaged, tensors = [], {}
    for name in files:
        if name in missing:
            continue
        try:
            tensors |= {tensor: (name, sizes) for tensor, sizes in _header(directory / name).items()}
        except ValueError as error:
            damaged.append(f"{name} ({error})")
    if missing or damaged:
        said = [f"{len(missing)} of {len(files)} shards missing: {some(missing)}"] if missing else []
        said += [f"{len(damaged)} damaged: {some(damaged)}"] if damaged else []
        return Finding(check, f"{directory}: {'; '.join(said)}; download them again", FAIL)
    _compare(directory, tensors, files, shape)
    total = sum((directory / name).stat().st_size for name in files)
    found = f"{directory}: {len(files)} file{'s' * (len(files) > 1)}, {len(tensors)} tensors, {format_bytes(total)}"
    return Finding(check, f"{found}, {many(shape.parameters)} parameters")


def _shards(directory: Path) -> list[str]:
    """Names of the weights' files; empty if there are neither an index nor a single file."""
    for name in (INDEX, SINGLE, OLD_INDEX, OLD_SINGLE):
        if (directory / name).is_file():
            return sorted(set(_index(directory / name).values())) if name in (INDEX, OLD_INDEX) else [name]
    return []


def _index(path: Path) -> dict[str, str]:
    """File names by tensor."""
    index = read_json(path, "an index of weights").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise InputError(f"{path}: has no weight_map; download the index again")
    return index


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor.  Raises ValueError if the file is not as long as its header implies."""
    if path.suffix == ".bin":
        from endprompt_megatron.convert.bin_files import BinFile

        return {name: tuple(tensor.shape) for name, tensor in BinFile(path).tensors.items()}
    held = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else held
        if 8 + length > held:
            raise ValueError(f"cut short at {format_bytes(held)}")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            for name, entry in entries.items():
                first, last = entry["data_offsets"]
                count = math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 0)
                if count and last - first != count:
                    raise ValueError(f"{name} has {last - first} bytes, its shape takes {count}")
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError("its header cannot be read") from None
    if held != end:
        raise ValueError(f"{held} bytes, its header says {end}")
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def _compare(directory: Path, tensors: dict, files: list[str], shape: ModelShape) -> None:
    """Raise InputError unless the tensors are those of config.json, and each where the index has it."""
    expected = {name: sizes for piece in mapping.pieces(shape) for name, sizes in piece.hf}
    lost = [name for name in expected if name not in tensors]
    if lost:
        raise InputError(f"{directory}: {len(lost)} tensors are missing: {some(lost)}; is the download complete?")
    other = [name for name, sizes in expected.items() if tensors[name][1] != sizes]
    if other:
        held = list(tensors[other[0]][1])
        raise InputError(f"{directory}: {other[0]} has shape {held}, config.json says {list(expected[other[0]])}")
    spare = [n for n in tensors if n not in expected and not n.endswith("rotary_emb.inv_freq")]
    spare = [n for n in spare if not (shape.tied_embeddings and n == mapping.TIED_DUPLICATE)]
    if spare:
        raise InputError(f"{directory}: {some(spare)}: not of the model in config.json; another architecture?")
    if files not in ([SINGLE], [OLD_SINGLE]):
        path = directory / (OLD_INDEX if files[0].endswith(".bin") else INDEX)
        index = _index(path)
        wrong = [name for name, file in index.items() if tensors.get(name, ("",))[0] != file]
        if wrong:
            raise InputError(f"{path}: says that {wrong[0]} is in {index[wrong[0]]}, but it is not there")


def converted_at(recipe: Recipe) -> Path | None:
    """The Megatron checkpoint that model.init_from names; None if there is none.  Raises InputError if it is broken."""
    if recipe.model.init_from is None or not Path(recipe.model.init_from).exists():
        return None
    if layout.is_hugging_face(Path(recipe.model.init_from)):
        return None
    return layout.find_checkpoint(Path(recipe.model.init_from), flag="model.init_from")


def converted_checkpoint(recipe: Recipe, shape: ModelShape) -> Finding:
    """What training starts from: the run's newest checkpoint, or the converted one; whole, and this model's."""
    root = recipe.run_dir / "checkpoints"
    newest = layout.newest_iteration(root)
    if newest is not None:
        from endprompt_megatron.checkpoint.resume import refuse_other_recipe

        directory = layout.iteration_dir(root, newest)
        refuse_other_recipe(layout.read_manifest(directory)["recipe"] or {}, recipe, "recipe", directory)
        try:
            held = _whole(directory)
        except InputError as error:
            before = layout.complete_iterations(root)[-2:-1]
            if not before:
                raise
            return Finding(CONVERTED, f"{error}: the run goes back to step {before[0]}", WARN)
        goes_on = f"the run goes on from step {newest} of {recipe.train.steps}"
        return Finding(CONVERTED, f"{directory}: {format_bytes(held)}; {goes_on}")
    if recipe.model.init_from is None:
        raise InputError(
            "model.init_from is missing; give what tools/convert_hf_to_megatron.py wrote, or model.hf's directory"
        )
    source = Path(recipe.model.init_from)
    if layout.is_hugging_face(source):
        layout.refuse_other_model(read_shape(source), shape, f"model.init_from={source}")
        found = _of_files(CONVERTED, source, _shards(source), shape)
        return found if found.verdict == FAIL else replace(found, found=f"none: every rank reads its own of {source}")
    directory = converted_at(recipe)
    if directory is None:
        return Finding(
            CONVERTED,
            f"model.init_from={source} is not there yet: tools/convert_hf_to_megatron.py --hf {recipe.model.hf} "
            f"--out {source} makes it; or give {recipe.model.hf} itself",
            WARN,
        )
    layout.refuse_other_model(read_shape(directory / layout.HF_DIRECTORY), shape, f"model.init_from={source}")
    try:
        held = _whole(directory)
    except InputError as error:
        raise InputError(f"{error}; make it again with tools/convert_hf_to_megatron.py") from None
    return Finding(CONVERTED, f"{directory}: {format_bytes(held)}, {shape.num_layers} layers, as model.hf")


def _whole(directory: Path) -> int:
    """Bytes of a torch_dist checkpoint.  Raises InputError if a file lacks bytes that its metadata counts on."""
    from torch.distributed.checkpoint import FileSystemReader

    recorded = layout.read_manifest(directory).get("files") or {}
    _refuse_short(directory, {name: file["bytes"] for name, file in recorded.items()})
    if not (directory / ".metadata").is_file():
        raise InputError(f"{directory}: .metadata is missing; the checkpoint is damaged")
    try:
        stored = FileSystemReader(directory).read_metadata().storage_data
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError):
        raise InputError(f"{directory}: .metadata cannot be read; the checkpoint is damaged") from None
    ends: dict[str, int] = {}
    for place in stored.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    _refuse_short(directory, ends)
    return sum(ends.values())


def _refuse_short(directory: Path, lengths: dict[str, int]) -> None:
    """Raise InputError if a file is missing or has fewer bytes than `lengths` says."""
    said = []
    for name, length in sorted(lengths.items()):
        path = directory / name
        if not path.is_file():
            said.append(f"{name} is missing")
        elif path.stat().st_size < length:
            said.append(f"{name} has {path.stat().st_size} of {length} bytes")
    if said:
        raise InputError(f"{directory}: {some(said)}; the checkpoint is damaged")


def tokenizer(recipe: Recipe, shape: ModelShape) -> Finding:
    """Its ids have embeddings, and the recipe's end prompts fit the sequence."""
    directory = Path(recipe.model.hf)
    check_vocabulary(directory, shape.vocab_size)
    lengths = context_lengths(recipe, shape)
    prompts = f", end prompts of {some(recipe.context.physical - a for a in lengths)} tokens"
    return Finding(
        TOKENIZER,
        f"fits the vocabulary of {shape.vocab_size}" + (prompts if MAPS[recipe.context.method].has_prompt else ""),
        OK,
    )


def context_lengths(recipe: Recipe, shape: ModelShape) -> list[int]:
    """Context tokens of a sample, for each prompt of the recipe and its sources.  Raises InputError."""
    c = recipe.context
    prompts: list[list[int]] = [[]]
    if MAPS[c.method].has_prompt:
        recall = recall_of(recipe)
        prompts = [] if recall and recall.share == 1 else tokenise_prompts(recipe.model.hf, prompts_used(recipe))
        prompts += [recall.prompt] if recall else []
    count = copies(c.method, **c.knobs)
    highest = max((max(prompt) for prompt in prompts if prompt), default=-1)
    if highest >= shape.vocab_size:
        raise InputError(
            f"context.prompts: token id {highest} is outside the model's vocabulary of {shape.vocab_size}; "
            "the tokenizer is not this model's"
        )
    try:
        return [segment_lengths(c.method, c.physical, count * len(prompt), c.target)[0] for prompt in prompts]
    except ValueError as error:
        raise InputError(f"context.method={c.method}: {error}") from None
