"""What an evaluation asks and how it scores: one module or folder a suite."""
