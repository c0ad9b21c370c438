"""Runs the `nanomoe` command as `python -m nanomoe`."""

from nanomoe import console


def main() -> None:
  """Runs the command as the module of this process."""
  console.main(entry=main)


if __name__ == '__main__':
  main()
