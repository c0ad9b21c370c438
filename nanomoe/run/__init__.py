"""The directory, the log and the command line of a run."""
