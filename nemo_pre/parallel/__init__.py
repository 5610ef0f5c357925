"""What losses need to work on sharded sequences: layouts, pooling, transport and gradient injection."""
