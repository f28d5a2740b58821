"""What a run did, for people: report.html, the same figures in the terminal, one prompt's whole story. Reads files only."""
