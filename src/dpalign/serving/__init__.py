"""The aligned model in use: the dial, the API server, the page."""
