"""The code that travels inside an exported model directory, for transformers' ``trust_remote_code``."""
