"""What a checkpoint of either side holds, without loading it: model, state of training, tensors, files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from endprompt_megatron.checkpoint import integrity, layout
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.common.units import format_bytes
from endprompt_megatron.convert.hf_weights import HfWeights
from endprompt_megatron.model.shape import shape_of

_OPTIMIZER = "optimizer."
_LAYOUT = "tensor pipeline virtual_pipeline context".split()


@dataclass(frozen=True)
class Tensor:
    """A tensor as its metadata has it: `parts` is how many shards it is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: int
    bytes: int


@dataclass
class Contents:
    """What `inspect` finds.  `model` is empty where there is no config.json, `training` in Hugging Face's."""

    path: str
    kind: str
    model: dict[str, object] = field(default_factory=dict)
    training: dict[str, object] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def page(self, tensors: bool) -> str:
        """For people: a line a fact, then the tensors if asked for, else their totals."""
        lines = [f"{self.path}: {self.kind}"]
        for title, facts in (("model", self.model), ("training", self.training)):
            lines += [f"  {title}"] if facts else []
            lines += [f"    {name:<18}{value}" for name, value in facts.items()]
        lines.append(f"  {len(self.files)} files, {format_bytes(sum(self.files.values()))}")
        if tensors:
            width = max(len(tensor.name) for tensor in self.tensors)
            for each in self.tensors:
                shards = f"{each.parts} shard{'s' * (each.parts > 1)}"
                sizes, size = " x ".join(map(str, each.shape)) or "scalar", format_bytes(each.bytes)
                lines.append(f"    {each.name:<{width}}  {each.dtype:<9}{sizes:<24}{size:>10}  {shards}")
            return "\n".join(lines)
        for title, mine in (("weights", False), ("optimizer state", True)):
            some = [tensor for tensor in self.tensors if tensor.name.startswith(_OPTIMIZER) == mine]
            if some:
                dtypes = ", ".join(sorted({tensor.dtype for tensor in some}))
                lines.append(f"    {title}: {len(some)} tensors, {format_bytes(sum(t.bytes for t in some))}, {dtypes}")
        return "\n".join(lines)


def inspect(path: Path, iteration: int | None = None) -> Contents:
    """Contents of a Hugging Face directory, a Megatron checkpoint directory (newest or `iteration`) or an iter_ one.

    Reads only metadata.  Raises InputError if it is neither, or cannot be read.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; expected a Hugging Face directory or a Megatron checkpoint")
    if layout.is_hugging_face(path):
        return _hugging_face(path)
    directory = path if (path / ".metadata").is_file() else layout.find_checkpoint(path, iteration, flag="PATH")
    return _megatron(directory)


def damage_of(contents: Contents) -> list[str]:
    """What is wrong with the files of a Megatron checkpoint, by its manifest; reads every byte.

    Raises InputError if there is no manifest: then `--verify` of the conversion tells.
    """
    directory = Path(contents.path)
    if not (directory / layout.MANIFEST).is_file():
        raise InputError(
            f"{directory}: has no {layout.MANIFEST} with CRC-32 of its files; compare it with its source by --verify"
        )
    return list(integrity.damage(directory))


def _hugging_face(path: Path) -> Contents:
    weights = HfWeights(path)
    tensors = [
        Tensor(name, held.entry.shape, held.entry.dtype.lower(), 1, held.entry.bytes)
        for name, held in weights.tensors.items()
    ]
    return Contents(str(path), "Hugging Face directory", _model(path), {}, tensors, _files(path))


def _megatron(directory: Path) -> Contents:
    checkpoint = Checkpoint(directory)
    tensors = []
    for name, value in sorted(checkpoint.tensors.items()):
        dtype = value.properties.dtype
        count = value.size.numel() * dtype.itemsize
        tensors.append(Tensor(name, tuple(value.size), str(dtype).removeprefix("torch."), len(value.chunks), count))
    hf = directory / layout.HF_DIRECTORY
    model = _model(hf) if (hf / "config.json").is_file() else {}
    training: dict[str, object] = {}
    if (directory / layout.MANIFEST).is_file():
        manifest = layout.read_manifest(directory)
        recipe = manifest["recipe"]
        training = {"step": manifest["step"], "samples consumed": manifest["consumed_samples"]}
        training["from"] = manifest["source"]
        if recipe is None:
            training["written by"] = "a conversion"
        else:
            c, p = recipe["context"], recipe["parallel"]
            training["method"] = f"{c['method']}, {c['original']} -> {c['target']} tokens, {c['physical']} physical"
            longlora = recipe.get("longlora") or {}
            if longlora.get("rank"):
                training["adapters"] = f"LoRA of rank {longlora['rank']}, alpha {longlora['alpha']}, not merged here"
            if manifest.get("base"):
                training["without"] = f"what is frozen: {manifest['base']['path']} has it"
            training["layout"] = ", ".join(f"{key} {p[key]}" for key in _LAYOUT if p.get(key))
        training["exported as"] = manifest["dtype"]
    return Contents(
        str(directory), "Megatron-Core checkpoint (torch_dist)", model, training, tensors, _files(directory)
    )


def _model(directory: Path) -> dict[str, object]:
    path = directory / "config.json"
    config = read_json(path, "a Hugging Face config")
    shape = shape_of(config, str(path))
    said = f"{shape.rope.type}, theta {shape.rope.theta:g}"
    said += "".join(f", {key} {value}" for key, value in shape.rope.scaling.items())
    return {
        "family": shape.family,
        "parameters": f"{shape.parameters:,}",
        "layers": shape.num_layers,
        "hidden": f"{shape.hidden_size}, feed-forward {shape.ffn_size}",
        "heads": f"{shape.num_heads} of {shape.head_dim}, {shape.num_kv_heads} for keys and values",
        "vocabulary": f"{shape.vocab_size}{', tied' if shape.tied_embeddings else ''}",
        "window": shape.window,
        "rope": said,
    }


def _files(directory: Path) -> dict[str, int]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
