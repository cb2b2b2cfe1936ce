"""The multi-objective reward model of section 2.1: its training, its scores, and how good they are."""
