"""From a corpus to a rank's micro-batches.

prepare.py tokenises a corpus into an indexed dataset (indexed.py is its format): sources.py finds the files,
pieces.py cuts them into work, readers.py and columns.py take the documents out, words.py has their ids,
tokenise.py writes a piece, join.py joins them.  dataset.py makes two-segment samples of the result, batch.py gives
a rank its own.  Importing the package imports nothing heavy: the worker processes of prepare.py start from here.
"""
