"""What the tests of samples share: datasets of a run from flat settings."""

from dataclasses import fields

from endprompt_megatron.data.samples.builder import SampleSpec
from endprompt_megatron.data.samples.dataset import DataSpec, WeightedDataset, build_datasets


def build(*, train: list[tuple], valid: list[tuple] | str | None = None, **settings):
    """build_datasets of settings by name, whichever object holds them; `train` and `valid` list (PREFIX, weight)."""
    datasets = {"train": [WeightedDataset(*each) for each in train]}
    datasets["valid"] = [WeightedDataset(*each) for each in valid] if isinstance(valid, list) else valid
    sample, data = (
        {field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings}
        for kind in (SampleSpec, DataSpec)
    )
    return build_datasets(SampleSpec(**sample), DataSpec(**datasets, **data), **settings)
