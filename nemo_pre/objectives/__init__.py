"""What a run optimises beside the words: one folder for each objective."""
