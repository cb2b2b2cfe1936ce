"""Using an aligned model: the dial, export, doctor, verify, server and terminal chat."""
