"""Array script of a sweep for SLURM."""

from collections.abc import Sequence
import os
import pathlib
import shlex
import sys

from nanomoe.sweeps.jobs import Job
from trainers.errors import UserError
from trainers.files import write_atomically

FILE = 'sweep.sbatch'

_SCRIPT = """\
#!/usr/bin/env bash
# Trains jobs of a sweep, each as a task of an array:
#
#   sbatch {path}
#
# Options of SLURM come before the script, such as sbatch --gpus-per-task=1. A
# task saves its state two minutes before the time limit, is queued again, and
# resumes. The command that wrote this file prints the table at the end.
#SBATCH --job-name={name}
#SBATCH --array={array}
#SBATCH --ntasks=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}

cd {directory} || exit 2
case "$SLURM_ARRAY_TASK_ID" in
{cases}
  *) echo "no job $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac

# srun does not read --cpus-per-task of the job by itself.
export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-}}"
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK

launch=()
command -v srun > /dev/null && launch=(srun)
"${{launch[@]}}" "${{PYTHON:-{python}}}" "${{words[@]}}"
code=$?
# 75: the run was interrupted, and its state is saved.
if [ "$code" -eq 75 ] && command -v scontrol > /dev/null; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def write(
  out: pathlib.Path,
  jobs: Sequence[Job],
  indices: Sequence[int],
  num_parallel: int,
) -> pathlib.Path:
  """Writes the array script of a sweep; returns its path.

  Args:
    out: Absolute directory of the sweep.
    jobs: All jobs.
    indices: Numbers of the jobs that are left. The tasks are 0, 1 and so on:
      SLURM allows a task no number above MaxArraySize.
    num_parallel: Number of tasks at a time; 0 for any number.

  Raises:
    UserError: The script cannot be written.
  """
  if '\n' in f'{out}{os.getcwd()}':  # It would end a comment of the script.
    raise UserError(f'--out={str(out)!r}: a path must not have line breaks')
  path = out / FILE
  limit = f'%{num_parallel}' if num_parallel else ''
  words = [jobs[i].words(out / jobs[i].name)[1:] for i in indices]
  cases = '\n'.join(
    f'  {task}) words=({shlex.join(each)}) ;;'
    for task, each in enumerate(words)
  )
  script = _SCRIPT.format(
    path=shlex.quote(str(path)),
    name=shlex.quote(out.name),
    array=f'0-{len(indices) - 1}{limit}',
    # SLURM replaces %A by the number of the array, and %a by that of the task.
    log=shlex.quote(str(out).replace('%', '%%') + '/slurm-%A_%a.log'),
    directory=shlex.quote(os.getcwd()),
    cases=cases,
    python=sys.executable,
  )
  try:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, script)
    path.chmod(0o755)
  except OSError as error:
    raise UserError(
      f'--out={out}: the script cannot be written ({error.strerror})'
    ) from error
  return path
