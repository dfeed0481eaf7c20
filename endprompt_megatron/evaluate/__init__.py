"""What a long-context model can do, measured: RULER, LongBench, perplexity, passkey retrieval, virtual distance.

requests.py says what a suite asks, question.py what one question is, base.py what a model that answers is.
perplexity.py, needle.py and virtual.py are suites of inputs, registry.py holds those that are modules of questions.
preparation.py makes all of them ready, suite.py has them asked (split.py: by several processes), store.py keeps every
answer, statistics.py gives each score its interval, and tables.py and plots.py show the results.  Only
megatron_engine.py, opened where it is asked for, imports Megatron.
"""
