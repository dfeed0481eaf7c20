"""Processes and devices: the only package that asks whether there is a GPU."""
