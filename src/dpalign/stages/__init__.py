"""One file a stage: its knobs, what it reads, its function and its cost. `pipeline/` knows their order."""
