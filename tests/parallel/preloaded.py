"""What the fork server of jobs.py imports, and what a rank that was forked from it does."""

import os
import random
import signal
import threading
import time

import torch
import torch.distributed as dist

from endprompt_megatron.distributed import cpu

torch.set_num_threads(1)
if not torch.cuda.is_available():
    cpu.install()  # before Megatron-Core is imported, as in a run

from endprompt_megatron import train as loop  # noqa: E402
from endprompt_megatron.common.errors import run_cli  # noqa: E402
from endprompt_megatron.config.load import load_recipe  # noqa: E402
from endprompt_megatron.data.samples.feed import Feed  # noqa: E402
from endprompt_megatron.distributed.signals import StopSignal  # noqa: E402
from endprompt_megatron.method.rope import frequencies  # noqa: E402, F401
from endprompt_megatron.model.llama import build_model  # noqa: E402, F401
from endprompt_megatron.training.metrics import Recorder  # noqa: E402, F401
from endprompt_megatron.training.optimizer import build_optimizer  # noqa: E402, F401
from endprompt_megatron.training.validation import Validation  # noqa: E402, F401


def train(recipe, overrides, trouble):
    """As tools/extend.py.  `trouble`, (kind, rank, step): from that step on this rank's reads "hang", or are "slow" and
    take half a second; or one "raises", where groups cannot be destroyed; or it gets a signal, by its name, when it
    reads that step or up to 20 ms later.
    """
    if trouble is not None and trouble[1] == int(os.environ["RANK"]):
        _disturb(*trouble)

    def main():
        with StopSignal().listening() as stop:
            return loop.train(load_recipe(recipe, overrides), recipe, stop)

    run_cli(main)


def _disturb(kind, _rank, step):
    read, sent = Feed.global_batch, []

    def disturbed(self, consumed_samples):
        if consumed_samples // self.global_batch_size + 1 >= step:
            if kind == "raises":
                dist.destroy_process_group = lambda *_: time.sleep(1e6)  # NCCL's, with kernels that never end
                raise RuntimeError("a read that nobody expected to fail")
            if kind in ("slow", "hang"):
                time.sleep(0.5 if kind == "slow" else 1e6)
            elif not sent:
                sent.append(kind)
                threading.Timer(random.uniform(0, 0.02), os.kill, (os.getpid(), signal.Signals[kind])).start()
        return read(self, consumed_samples)

    Feed.global_batch = disturbed
