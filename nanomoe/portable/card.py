"""Model card of an exported run."""

import pathlib
from typing import Any

from nanomoe.config.schema import Config
from nanomoe.model import parameters

_TRANSFORMERS = """\
Run this in the directory of the model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('.')
model = AutoModelForCausalLM.from_pretrained('.')
inputs = tokenizer({prompt!r}, return_tensors='pt')
tokens = model.generate(
  **inputs, max_new_tokens=200, do_sample=True, temperature=0.8
)
print(tokenizer.decode(tokens[0]))
```
"""
_LLAMA_CPP = """\
Run this in the directory of the model, with `llama-server` of llama.cpp or with
its Python package (`pip install xllamacpp`):

```sh
llama-server --model model.gguf --cache-type-k f32 --cache-type-v f32
```

```python
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = 'model.gguf'
params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
sampling = {{'temperature': 0.8, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0}}
answer = server.handle_completions(
  {{'prompt': {prompt!r}, 'max_tokens': 200, **sampling}}
)
print(answer['choices'][0]['text'])
```

llama.cpp rounds keys and values unless the types of its cache are f32.
"""
# Example, and title of the model's name, by library.
_LIBRARIES = {
  'transformers': (_TRANSFORMERS, 'Class'),
  'gguf': (_LLAMA_CPP, 'Architecture in llama.cpp'),
}
# Results of the verification by name, as sentences.
_CHECKS = {
  'equal_weights': 'The weights equal those of the checkpoint, as {}, bitwise.',
  'equal_token_ids': '{:,} token ids of the validation split are equal.',
  'max_logit_difference': (
    'The logits of transformers differ by at most {:.1e}, in float32.'
  ),
  'greedy_tokens': '{} greedy tokens of transformers are equal.',
  'transformers': 'The version of transformers was {}.',
}


def text(
  directory: pathlib.Path,
  config: Config,
  name: str,
  params: Any,
  facts: dict[str, Any],
  checks: dict[str, Any],
  prompt: str,
  library: str = 'transformers',
) -> str:
  """Returns the model card.

  Args:
    directory: Directory of the export.
    config: Config of the run.
    name: Name of the class in transformers, or of the architecture in
      llama.cpp.
    params: Tree of parameters.
    facts: Facts about the run by name: corpus, step and losses.
    checks: Results of the verification by name.
    prompt: Text to continue in the example.
    library: Library that loads the files, 'transformers' or 'gguf'.
  """
  use, title = _LIBRARIES[library]
  counts = parameters.count(params, config.moe.top_k)
  moe = config.moe
  rows = {
    title: f'`{name}`',
    'Parameters': f'{counts["num_params"]:,}',
    'Active parameters of a token': f'{counts["num_active_params"]:,}',
    'Layers': config.model.num_layers,
    'Experts of a layer': moe.num_experts,
    'Experts of a token': moe.top_k,
    'Router': moe.router.type,
    'Context in training': f'{config.block_size} tokens',
    'Tokenizer': config.data.tokenizer.type,
    **facts,
  }
  table = [f'| {key} | {value} |' for key, value in rows.items()]
  checked = [f'- {_CHECKS[name].format(x)}' for name, x in checks.items()]
  return '\n'.join(
    [
      '---',
      f'library_name: {library}',
      'pipeline_tag: text-generation',
      'tags: [nanomoe, mixture-of-experts]',
      '---',
      '',
      f'# {directory.name}',
      '',
      'A language model, trained by NanoMoE.',
      '',
      '| Property | Value |',
      '|---|---|',
      *table,
      '',
      '## Use',
      '',
      use.format(prompt=prompt),
      '## Verification',
      '',
      'The export compared the files with the checkpoint.',
      '',
      *checked,
      '',
    ]
  )
