"""Save, find the newest complete checkpoint, resume: whole or not there, and never a damaged one.

A rank saves what it holds (weights.py, optimizer.py); files.py has how the first rank joins that.
"""

from endprompt_megatron.checkpoint.resume import initialise, resume
from endprompt_megatron.checkpoint.run_progress import Progress
from endprompt_megatron.checkpoint.save import Saver, require_room, save

__all__ = ["Progress", "Saver", "initialise", "require_room", "resume", "save"]
