"""What a run's time went to, against what the machine could do; and what a run will cost. Reads files, changes none of a run's."""
