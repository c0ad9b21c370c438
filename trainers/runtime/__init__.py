"""The process and the machine that a run has: memory, keys, debuggers."""
