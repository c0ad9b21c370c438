"""Times a dense GPT in PyTorch, eager. In its environment.

Of base.py's sizes with one feed-forward layer in place of the experts: about
0.8M parameters. Tied embeddings, fused attention and a fused AdamW; bfloat16
autocast, and without it, where CPUs have no units for bfloat16.
"""

import functools
import time

from serve import serve
import torch
from torch import nn
from torch.nn import functional as F

BATCH, TIME, VOCAB, LAYERS, HEADS, WIDTH, DROPOUT = 32, 128, 65, 4, 4, 128, 0.1


class Block(nn.Module):
  def __init__(self):
    super().__init__()
    self.attention_norm = nn.LayerNorm(WIDTH)
    self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
    self.out = nn.Linear(WIDTH, WIDTH)
    self.feed_forward = nn.Sequential(
      nn.LayerNorm(WIDTH),
      nn.Linear(WIDTH, 4 * WIDTH),
      nn.GELU(),
      nn.Linear(4 * WIDTH, WIDTH),
      nn.Dropout(DROPOUT),
    )

  def forward(self, x):
    qkv = self.qkv(self.attention_norm(x)).view(
      *x.shape[:2], 3, HEADS, WIDTH // HEADS
    )
    y = F.scaled_dot_product_attention(
      *qkv.permute(2, 0, 3, 1, 4),
      dropout_p=DROPOUT if self.training else 0.0,
      is_causal=True,
    )
    y = self.out(y.transpose(1, 2).reshape(x.shape))
    x = x + F.dropout(y, DROPOUT, self.training)
    return x + self.feed_forward(x)


class GPT(nn.Module):
  def __init__(self):
    super().__init__()
    self.tokens = nn.Embedding(VOCAB, WIDTH)
    self.positions = nn.Embedding(TIME, WIDTH)
    self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
    self.norm = nn.LayerNorm(WIDTH)

  def forward(self, tokens, targets):
    x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
    x = self.blocks(F.dropout(x, DROPOUT, self.training))
    logits = F.linear(self.norm(x), self.tokens.weight)
    return F.cross_entropy(logits.view(-1, VOCAB), targets.flatten())


def _model_and_tokens():
  torch.manual_seed(0)
  tokens = torch.randint(VOCAB, (BATCH, TIME + 1))
  return GPT(), tokens[:, :-1], tokens[:, 1:]


def step(autocast=True):
  model, x, y = _model_and_tokens()
  optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)

  def once() -> float:
    start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
      loss = model(x, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start

  return lambda n: [once() for _ in range(n)]


def evaluation():
  model, x, y = _model_and_tokens()
  model.eval()

  def run(n: int) -> list[float]:
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
      for _ in range(n):
        model(x, y).item()
    return [(time.perf_counter() - start) / n]

  return run


if __name__ == '__main__':
  serve(
    {
      'step': step,
      'step_float32': functools.partial(step, autocast=False),
      'evaluation': evaluation,
    }
  )
