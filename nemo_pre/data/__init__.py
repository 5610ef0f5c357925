"""Reading prepared data: shards, conversations, images, batches and the order in which samples are consumed."""
