"""A run's configuration: its schema, how the recipes are composed into it, and what is refused before building."""
