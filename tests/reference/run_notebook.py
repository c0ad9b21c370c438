"""Executes a notebook in a kernel, as `jupyter execute` does.

python tests/reference/run_notebook.py NOTEBOOK DIRECTORY OUTPUT

The cells run in DIRECTORY, and OUTPUT is the notebook with their outputs. The
script ends with an error if a cell raises that is not tagged raises-exception.
It runs in an environment with nbclient and ipykernel.
"""

import pathlib
import sys

from nbclient import NotebookClient
import nbformat


def main(notebook: str, directory: str, output: str) -> None:
  cells = nbformat.read(notebook, as_version=4)
  resources = {'metadata': {'path': directory}}
  NotebookClient(cells, timeout=900, resources=resources).execute()
  for cell in cells.cells:
    cell.metadata.pop('execution', None)  # Times differ from run to run.
    # Libraries warn there of the machine, such as of a slow compilation.
    if cell.cell_type == 'code':
      cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
  pathlib.Path(output).write_text(nbformat.writes(cells) + '\n')


if __name__ == '__main__':
  main(*sys.argv[1:])
