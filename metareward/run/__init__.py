"""What every stage stands on: the run directory, resumable files, user input, ranks, progress, metrics."""
