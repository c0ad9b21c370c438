"""Continues prompts with llama.cpp, and tokenizes texts.

python llama_cpp.py MODEL.gguf < REQUEST

The request is JSON: `prompts`, lists of token ids, `num_tokens` and `texts`.
The answer has a greedy continuation of each prompt, with the log probability of
its tokens, and the token ids of each text. It runs in an environment with
xllamacpp.
"""

import json
import sys
import urllib.request

import xllamacpp


def serve(path: str) -> xllamacpp.Server:
  """Returns a server that keeps keys and values in float32."""
  params = xllamacpp.CommonParams()
  params.model.path = path
  params.n_parallel = 1
  params.n_gpu_layers = 0
  params.warmup = params.fit_params = params.use_jinja = False
  params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
  params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
  params.flash_attn_type = (
    xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  )
  params.verbosity = 0
  return xllamacpp.Server(params)


def main(path: str) -> None:
  request = json.load(sys.stdin)
  server = serve(path)

  def post(route, **body):
    message = urllib.request.Request(
      f'{server.listening_address}/{route}',
      json.dumps(body).encode(),
      {'Content-Type': 'application/json'},
    )
    with urllib.request.urlopen(message) as answer:
      return json.load(answer)

  answers = [
    post(
      'completion',
      prompt=prompt,
      n_predict=request['num_tokens'],
      temperature=0,
      return_tokens=True,
      n_probs=1,
      cache_prompt=False,
    )
    for prompt in request['prompts']
  ]
  answer = {
    'tokens': [a['tokens'] for a in answers],
    'logprobs': [
      [p['logprob'] for p in a['completion_probabilities']] for a in answers
    ],
    'ids': [
      post('tokenize', content=text)['tokens'] for text in request['texts']
    ],
  }
  print(json.dumps(answer))


if __name__ == '__main__':
  main(*sys.argv[1:])
