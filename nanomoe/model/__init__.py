"""The transformer: its parts, and how a config combines them."""
