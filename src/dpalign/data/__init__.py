"""Public rating, preference and chat data sets, read into the package's own rows."""
