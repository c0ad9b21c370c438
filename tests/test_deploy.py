"""The files of deploy/, with stand-ins for what a cluster has."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

from nanomoe.run.cluster import resolve
from nanomoe.run.launchers import LAUNCHERS
from tests import runs
from tests.shrunk import ROOT, TINY

DEPLOY = ROOT / 'deploy'


def _object(required=(), **properties):
  return {
    'type': 'object',
    'properties': properties,
    'required': [*required],
    'additionalProperties': False,
  }


def _list(items):
  return {'type': 'array', 'items': items, 'minItems': 1}


TEXT, NUMBER, SWITCH = ({'type': t} for t in ('string', 'integer', 'boolean'))
QUANTITIES = {'type': 'object', 'additionalProperties': TEXT}
CONTAINER = _object(
  ['name', 'image'],
  name=TEXT,
  image=TEXT,
  args=_list(TEXT),
  command=_list(TEXT),
  env=_list(
    _object(
      ['name'],
      name=TEXT,
      value=TEXT,
      valueFrom=_object(fieldRef=_object(['fieldPath'], fieldPath=TEXT)),
    )
  ),
  ports=_list(_object(['containerPort'], containerPort=NUMBER)),
  resources=_object(requests=QUANTITIES, limits=QUANTITIES),
  volumeMounts=_list(_object(['name', 'mountPath'], name=TEXT, mountPath=TEXT)),
)
POD = _object(
  ['containers'],
  restartPolicy={'enum': ['Never', 'OnFailure']},
  terminationGracePeriodSeconds=NUMBER,
  securityContext=_object(runAsUser=NUMBER, fsGroup=NUMBER),
  containers=_list(CONTAINER),
  volumes=_list(
    _object(
      ['name'],
      name=TEXT,
      persistentVolumeClaim=_object(['claimName'], claimName=TEXT),
    )
  ),
)
JOB = _object(
  ['template'],
  completionMode={'enum': ['NonIndexed', 'Indexed']},
  parallelism=NUMBER,
  completions=NUMBER,
  backoffLimit=NUMBER,
  podFailurePolicy=_object(
    ['rules'],
    rules=_list(
      _object(
        ['action'],
        action={'enum': ['FailJob', 'FailIndex', 'Ignore', 'Count']},
        onPodConditions=_list(
          _object(
            ['type'], type=TEXT, status={'enum': ['True', 'False', 'Unknown']}
          )
        ),
        onExitCodes=_object(
          ['operator', 'values'],
          containerName=TEXT,
          operator={'enum': ['In', 'NotIn']},
          values=_list(NUMBER),
        ),
      )
    ),
  ),
  template=_object(spec=POD),
)
# The part of jobset.x-k8s.io/v1alpha2 that the manifest uses. The definition of
# the resource itself has 800 kB; the manifest was checked with it too.
JOBSET = _object(
  ['apiVersion', 'kind', 'metadata', 'spec'],
  apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
  kind={'const': 'JobSet'},
  metadata=_object(['name'], name={'pattern': '^[a-z][a-z0-9-]*$'}),
  spec=_object(
    network=_object(
      enableDNSHostnames=SWITCH, publishNotReadyAddresses=SWITCH, subdomain=TEXT
    ),
    failurePolicy=_object(
      maxRestarts=NUMBER,
      restartStrategy={
        'enum': ['Recreate', 'BlockingRecreate', 'InPlaceRestart']
      },
      rules=_list(
        _object(
          ['action', 'name'],
          name={'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
          action={
            'enum': [
              'FailJobSet',
              'RestartJobSet',
              'RestartJobSetAndIgnoreMaxRestarts',
            ]
          },
          onJobFailureReasons=_list(TEXT),
        )
      ),
    ),
    replicatedJobs=_list(
      _object(
        ['name', 'template'],
        name=TEXT,
        replicas=NUMBER,
        template=_object(spec=JOB),
      )
    ),
  ),
)


@pytest.fixture(scope='module')
def manifest():
  return yaml.safe_load((DEPLOY / 'jobset.yaml').read_text())


def test_the_manifest_is_a_jobset(manifest):
  jsonschema.validate(manifest, JOBSET)
  manifest['spec']['replicatedJobs'][0]['replica'] = 1
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(manifest, JOBSET)


def test_the_pods_of_the_manifest_are_a_cluster(manifest):
  (workers,) = manifest['spec']['replicatedJobs']
  job = workers['template']['spec']
  (container,) = job['template']['spec']['containers']
  fields = {
    "metadata.annotations['jobset.sigs.k8s.io/jobset-name']": 'nanomoe',
    "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-name']": 'workers',
  }
  environ = {
    row['name']: row.get('value')
    or fields[row['valueFrom']['fieldRef']['fieldPath']]
    for row in container['env']
  }
  environ['JOB_COMPLETION_INDEX'] = '1'  # Of Kubernetes, in an indexed job.
  assert job['completionMode'] == 'Indexed'
  assert {*LAUNCHERS['Kubernetes'].variables} == {*environ}
  found = resolve(None, None, None, environ)
  assert found
  port = container['ports'][0]['containerPort']
  assert found.coordinator == f'nanomoe-workers-0-0.nanomoe:{port}'
  assert found.num_processes == job['parallelism'] == job['completions']
  assert workers['replicas'] == 1


# `sbatch` runs a script with the variables of a job, again after a requeue.
SBATCH = """#!/usr/bin/env bash
export SLURM_JOB_ID=77 SLURM_JOB_NODELIST=localhost SLURM_NTASKS=$TASKS
export SLURM_PROCID=0 SLURM_LOCALID=0
while :; do
  rm -f "$STATE/requeued"
  bash "$@"
  code=$?
  echo "job $code" >> "$STATE/log"
  [ -e "$STATE/requeued" ] || exit $code
done
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = 'requeue 77' ] && touch "$STATE/requeued"
"""
# `srun` starts tasks with the variables of a step. At the first start it sends
# SIGUSR1 to all once the file $STATE/ready exists.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=127.0.0.1
export SLURM_STEP_NUM_TASKS=$TASKS SLURM_STEP_TASKS_PER_NODE=$TASKS
tasks=()
for ((i = 0; i < TASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  tasks+=($!)
done
if [ ! -e "$STATE/signalled" ]; then
  until [ -e "$STATE/ready" ]; do
    sleep 0.05
    kill -0 "${tasks[0]}" || break
  done
  touch "$STATE/signalled"
  kill -USR1 "${tasks[@]}"
fi
code=0
for task in "${tasks[@]}"; do
  wait "$task"
  last=$?
  [ $last -gt $code ] && code=$last
done
exit $code
"""
# Connects to the other tasks. At the first start it waits for the signal.
TASK = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
from nanomoe.run import cluster
state = pathlib.Path(os.environ['STATE'])
def save(*_):
  os._exit(75)
signal.signal(signal.SIGUSR1, save)
found = cluster.resolve(None, None, None, os.environ)
cluster.connect(found, 30)
import jax
from jax.experimental import multihost_utils
total = sum(multihost_utils.process_allgather(jax.process_index()))
os.write(1, (' '.join([str(total), *sys.argv[1:]]) + '\\n').encode())
if not (state / 'signalled').exists():
  (state / 'ready').touch()
  time.sleep(30)
"""


@pytest.fixture
def slurm(tmp_path):
  """slurm(tasks, words) -> the finished job; its log is in tmp_path / log."""
  for name, text in [
    ('sbatch', SBATCH),
    ('srun', SRUN),
    ('scontrol', SCONTROL),
    ('task', TASK),
  ]:
    path = tmp_path / 'bin' / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def submit(tasks: int, words: list[str], **environ: str):
    return subprocess.run(
      ['sbatch', str(DEPLOY / 'slurm.sbatch'), *words],
      cwd=ROOT,
      env={
        **os.environ,
        'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}',
        'PYTHONPATH': str(ROOT),
        'PYTHON': sys.executable,
        'STATE': str(tmp_path),
        'TASKS': str(tasks),
        **environ,
      },
      capture_output=True,
      text=True,
      timeout=100,
    )

  return submit


def _directives() -> set[str]:
  text = (DEPLOY / 'slurm.sbatch').read_text()
  return set(re.findall(r'^#SBATCH --(\S+)$', text, re.MULTILINE))


def test_the_batch_script_asks_for_a_signal_and_a_requeue():
  assert {'requeue', 'open-mode=append', 'signal=USR1@120'} <= _directives()


@pytest.mark.slow
def test_tasks_of_a_batch_script_connect_and_are_queued_again(slurm, tmp_path):
  done = slurm(2, ['--config=x'], PYTHON=str(tmp_path / 'bin' / 'task'))
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'log').read_text() == 'job 75\njob 0\n'
  # Two tasks, twice: the sum of their numbers, and the command. The library of
  # collectives writes between them, also within a line.
  words = '1 -m nanomoe.main --workdir=runs/slurm-77 --config=x'
  assert done.stdout.count(words) == 4, done.stdout


@pytest.mark.slow
def test_an_interrupted_run_of_a_batch_script_resumes(slurm, corpus, tmp_path):
  workdir = tmp_path / 'run'
  values = {**TINY, 'data.path': corpus, 'num_train_steps': 1000}
  (tmp_path / 'ready').symlink_to(workdir / 'result.json')  # From step 1 on.
  done = slurm(
    1,
    [
      '--config=configs/base.py',
      f'--workdir={workdir}',
      *(f'--config.{key}={value}' for key, value in values.items()),
      '--config.eval_interval=1000',
      '--config.sample.every_steps=1000',
    ],
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'log').read_text() == 'job 75\njob 0\n'
  assert 'interrupted by SIGUSR1' in done.stdout
  assert runs.result_of(workdir)['status'] == 'done'


@pytest.mark.slow
def test_a_failed_run_of_a_batch_script_is_not_queued_again(slurm, tmp_path):
  done = slurm(1, ['--config=missing.py'])
  assert done.returncode == 2
  assert (tmp_path / 'log').read_text() == 'job 2\n'


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('mpirun'), reason='there is no Open MPI')
def test_processes_of_mpirun_connect(tmp_path):
  task = tmp_path / 'task.py'
  task.write_text(TASK)
  (tmp_path / 'signalled').touch()
  done = subprocess.run(
    [
      *('mpirun', '-n', '2', '--oversubscribe', '--bind-to', 'none'),
      *(sys.executable, str(task), 'x'),
    ],
    env={
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'STATE': str(tmp_path),
      'OMPI_ALLOW_RUN_AS_ROOT': '1',
      'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1',
    },
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('1 x') == 2, done.stdout


def _steps() -> dict[str, list[str]]:
  """Returns the arguments of each instruction of the Dockerfile."""
  steps: dict[str, list[str]] = {}
  text = (DEPLOY / 'Dockerfile').read_text().replace('\\\n', '')
  for line in text.splitlines():
    if line and not line.startswith('#'):
      name, _, rest = line.partition(' ')
      steps.setdefault(name, []).append(rest)
  return steps


def _copied(target: pathlib.Path) -> None:
  """Copies what `COPY . .` copies, without the names of .dockerignore."""
  names = (ROOT / '.dockerignore').read_text().split()
  ignored = shutil.ignore_patterns(*(n.removeprefix('**/') for n in names))
  shutil.copytree(ROOT, target, ignore=ignored)


@pytest.mark.slow
def test_the_steps_of_the_dockerfile_run(tmp_path):
  steps = _steps()
  context, venv = tmp_path / 'context', tmp_path / 'venv'
  assert steps['COPY'] == ['. .']
  _copied(context)
  assert not (context / '.git').exists()
  subprocess.run([sys.executable, '-m', 'venv', str(venv)], check=True)
  environ = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  environ |= dict(word.split('=', 1) for word in [*steps['ARG']])
  environ['PATH'] = f'{venv / "bin"}:{environ["PATH"]}'
  for command in steps['RUN']:
    done = subprocess.run(
      ['sh', '-ec', command],
      cwd=context,
      env=environ,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
  (entry,), (arguments,) = steps['ENTRYPOINT'], steps['CMD']
  words = [*yaml.safe_load(entry), *yaml.safe_load(arguments)]
  shown = subprocess.run(
    words, cwd=context, env=environ, capture_output=True, text=True
  )
  assert shown.returncode == 0, shown.stderr
  assert 'launch' in shown.stdout


def test_the_image_can_have_cuda():
  extra = re.search(
    r'--build-arg EXTRA=(\w+)', (DEPLOY / 'Dockerfile').read_text()
  )
  assert extra
  assert f'\n{extra[1]} =\n' in (ROOT / 'setup.cfg').read_text()
