"""What every room uses and what knows none of them: errors, files, workers, packages."""
