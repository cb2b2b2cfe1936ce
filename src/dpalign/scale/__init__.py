"""More than one process: shards made by a cluster's actors, and training in several processes."""
