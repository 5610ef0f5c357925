"""What is decided about a run before it starts: refused in one sentence, or warned of."""
