"""The transformer: its parts, and how a config puts them together."""
