"""From a corpus to a rank's micro-batches.

prepare.py makes an indexed dataset of a corpus (indexed.py is its format): sources.py finds the files, readers.py
takes documents out, words.py has their ids.  windows.py and stream.py, or packing.py and packed.py, say which tokens
a sample takes, builder.py makes two-segment samples of them, dataset.py blends sources, batches.py gives a rank its
own.  chat.py and answers.py are of conversations, which conversations.py packs.  Importing the package imports nothing
heavy: the worker processes of prepare.py start from here.
"""
