"""From a corpus of text to an indexed dataset."""
