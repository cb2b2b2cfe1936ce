"""What this machine can run, and whether a model's folder is sound: in plain words, with the command that mends it."""
