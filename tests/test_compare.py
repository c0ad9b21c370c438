"""The command compare as a process, on runs that were trained."""

import json
import shutil
import sys


def test_runs_are_compared(finished, run, tmp_path):
  """Two seeds and another learning rate: two groups of one shape."""
  workdir, _ = finished
  for name, seed, rate in (('a', 0, 1e-3), ('b', 1, 1e-3), ('c', 0, 2e-3)):
    shutil.copytree(workdir, tmp_path / name)
    path = tmp_path / name / 'config.json'
    config = json.loads(path.read_text())
    config['seed'], config['optimizer']['learning_rate'] = seed, rate
    path.write_text(json.dumps(config))
  words = [sys.executable, '-m', 'nanomoe', 'compare', str(tmp_path / '[a-c]')]
  page = tmp_path / 'page.html'
  process = run([*words, '--format=json', f'--html={page}'])
  assert process.returncode == 0, process.stderr
  value = json.loads(process.stdout)
  assert value['keys'] == ['optimizer.learning_rate']
  assert [group['seeds'] for group in value['groups']] == [[0, 1], [0]]
  result = json.loads((workdir / 'result.json').read_text())
  for each in value['runs']:
    assert each['num_active_params'] == result['num_active_params']
    assert each['equal']['steps'] == result['val_loss']
    assert 0 < each['active_flops_per_token'] <= each['flops_per_token']
  assert page.read_text().startswith('<!DOCTYPE html>')
