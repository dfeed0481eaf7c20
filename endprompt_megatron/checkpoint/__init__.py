"""Save, find the newest complete checkpoint, resume: whole or not there, and never a damaged one.

save.py and resume.py are what training calls.  A rank saves what it holds (weights.py, optimizer_state.py);
integrity.py has how the first rank joins that.  Importing the package imports nothing: converters need layout.py and
torch_dist.py without Megatron-Core.
"""
