"""Conversion between Hugging Face directories and Megatron-Core distributed checkpoints.

mapping.py maps the weights of a family (model/families.py); hf_weights.py reads and hf_writing.py writes Hugging
Face's files, the checkpoint package those of Megatron-Core; to_megatron.py and to_hf.py are the two directions,
work_units.py has workers write the files of either, and direct.py does without a converted checkpoint.
"""
