"""A training step at one rank of a cluster that is not there: what it would allocate, send and compute."""
