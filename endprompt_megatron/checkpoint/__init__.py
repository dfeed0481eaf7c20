"""Save, find the newest complete checkpoint, resume: whole or not there, and never a damaged one.

A rank saves what it holds (weights.py, optimizer_state.py); integrity.py has how the first rank joins that.
"""

from endprompt_megatron.checkpoint.resume import initialise, resume
from endprompt_megatron.checkpoint.run_state import Progress, RunState
from endprompt_megatron.checkpoint.save import Saver, require_disk_space, save

__all__ = ["Progress", "RunState", "Saver", "initialise", "require_disk_space", "resume", "save"]
