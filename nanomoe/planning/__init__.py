"""Plans of a training run: its work, memory and traffic, before it runs."""
