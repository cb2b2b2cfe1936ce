"""The page of a run: its figures, its tables and its answers, in one file that needs nothing else."""
