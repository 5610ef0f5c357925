"""What wants a GPU: every benchmark at once, and the first contact with a machine."""
