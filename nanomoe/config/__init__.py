"""Config keys, overrides and the resume policy."""
