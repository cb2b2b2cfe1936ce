"""What a recipe will cost: tokens, FLOPs and GPU-hours by stage, memory and disk; counted, before anything runs."""
