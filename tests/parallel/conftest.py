import pytest
from parallel.cases import SHAPES
from parallel.ranks import Ranks
from small import small_llama

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron


@pytest.fixture(scope="session")
def ranks():
    pool = Ranks(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Each small model once: {name: (directory, Hugging Face, Megatron)}."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            small_llama(directory / "hf", **SHAPES[name])
            convert_hf_to_megatron(directory / "hf", directory / "megatron")
            made[name] = (directory, directory / "hf", directory / "megatron")
        return made[name]

    return get
