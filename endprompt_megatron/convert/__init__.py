"""Conversion between Hugging Face directories and Megatron-Core distributed checkpoints.

mapping.py is the map of names and layouts, layout.py the directories, hf_weights.py and torch_dist.py
read and write the two formats tensor by tensor, to_megatron.py and to_hf.py are the two directions,
units.py has workers write the files of either, and direct.py does without a converted checkpoint.
"""
