"""The stages of a run: each a function from files to files, complete when its output has its final name."""
