"""Text and conversations to an indexed dataset.

inputs.py finds the files, chunks.py cuts them into work, readers.py and columns.py take documents out, filters.py says
which are kept, encoders.py and words.py make token ids of them; tokenise.py does one chunk, prepare.py all of them, and
finish.py and manifest.py make the dataset of what they gave.
"""
