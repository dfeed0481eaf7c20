"""From an indexed dataset to a rank's micro-batches.

windows.py and stream.py, or packing.py and packed.py, say which tokens a sample takes, and builder.py makes samples of
them: context, terminal prompt, positions, weights.  dataset.py blends sources, of_recipe.py builds what a recipe asks
for, batches.py gives a rank its own, feed.py is what the training loop reads.
"""
