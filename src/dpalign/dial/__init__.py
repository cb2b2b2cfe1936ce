"""The aligned model in people's hands: the dial, and what stands behind it."""
