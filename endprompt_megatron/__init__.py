"""endprompt_megatron: long context for LLaMA-family models by the EndPrompt method, on Megatron-Core.

Importing the package imports nothing heavy and changes nothing: what lets Megatron-Core run
without CUDA lives in cpu.py and is installed by runtime.py, only where there is no CUDA.
"""

__version__ = "0.1.0"
