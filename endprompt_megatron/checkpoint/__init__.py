"""A run's checkpoints: saved, found again and resumed; complete or not there, and never a damaged one.

save.py has every rank write what it holds (weights.py, optimizer_state.py) and the first one join that
(integrity.py); resume.py goes back to the newest; layout.py has the directories, torch_dist.py the format.
Importing the package imports nothing heavy: the converter's workers use the format without Megatron.
"""
