"""The run folder: what is done is skipped, what was killed goes on."""
