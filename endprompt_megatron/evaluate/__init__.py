"""What a long-context model can do, measured: perplexity, passkey retrieval, the virtual-distance probe.

engine.py says what a model that answers is; text.py reads held-out text; perplexity.py, needle.py and virtual.py
are the measurements, each a function of (engine, tokens, settings); suite.py runs them on the baseline and the
extended model; tables.py and plots.py show the results.  Nothing here imports Megatron or the training loop.
"""
