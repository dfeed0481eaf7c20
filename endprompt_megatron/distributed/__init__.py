"""Processes and devices: the only room that asks whether there is a GPU."""
