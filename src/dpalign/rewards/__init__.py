"""The multi-objective reward model of section 2.1: its training and its scores; other scorers of answers too."""
