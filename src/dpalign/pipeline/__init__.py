"""The loop of section 2.2 and the comparison as a list of steps, and the commands that take them."""
