"""The run folder: finished stages are skipped, killed ones go on."""
