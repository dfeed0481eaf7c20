"""What a long-context model can do, measured: RULER, LongBench, perplexity, passkey retrieval, virtual distance.

registry.py is the table of suites and says how to add one; suite.py what a suite declares, options.py its options.
requests.py says what a model is asked, engines/ how it answers.  preparation.py makes every suite ready,
evaluation.py has them asked (split.py: by several processes), store.py keeps every answer, intervals.py gives each
score its interval, and terminal.py shows the results.  Only megatron_engine.py, opened where it is asked for, imports
Megatron.
"""
