"""From a corpus to a rank's micro-batches.

sources.py reads text files, prepare.py tokenises them into an indexed dataset (indexed.py is its format),
dataset.py makes two-segment samples of it, batch.py gives a rank its own.  Importing the package imports
nothing heavy: the worker processes of prepare.py start from here.
"""
