"""From a corpus to a rank's micro-batches.

corpus/ makes an indexed dataset of files (indexed.py is its format), samples/ makes the samples of a run of it, and
describe/ shows what a run will train on.  compatibility.py says whether a dataset fits a model.  Importing the package
imports nothing heavy: the worker processes of corpus/prepare.py start from here.
"""
