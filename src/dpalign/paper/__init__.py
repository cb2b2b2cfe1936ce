"""What the paper defines; numpy only."""
