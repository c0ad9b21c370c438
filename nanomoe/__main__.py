"""Runs the `nanomoe` command as `python -m nanomoe`."""

from nanomoe.console import main

if __name__ == '__main__':
  main()
