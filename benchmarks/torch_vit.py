"""This project's Vision Transformer in efficient PyTorch code, as a baseline for speed."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
  """Pre-norm block with PyTorch's fused attention and a single projection for Q, K and V."""

  def __init__(self, width: int, num_heads: int, head_dim: int, mlp_dim: int, approximate: str):
    super().__init__()
    self.heads = num_heads, head_dim
    self.attention_norm = nn.LayerNorm(width, eps=1e-6)
    self.qkv = nn.Linear(width, 3 * num_heads * head_dim)
    self.out = nn.Linear(num_heads * head_dim, width)
    self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
    self.approximate = approximate  # GELU: `none` or `tanh`
    self.up, self.down = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)

  def forward(self, x):
    batch, tokens, _ = x.shape
    qkv = self.qkv(self.attention_norm(x)).reshape(batch, tokens, 3, *self.heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(query, key, value)
    x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, -1))
    y = functional.gelu(self.up(self.mlp_norm(x)), approximate=self.approximate)
    return x + self.down(y)


class TorchViT(nn.Module):
  """Vision Transformer with learned positions and the pool `cls` or `gap`.

  The arguments are the result of `works.sizes`.
  """

  def __init__(
    self,
    image_size,
    patch_size,
    width,
    depth,
    num_heads,
    head_dim,
    mlp_dim,
    activation,
    pool,
    num_classes,
  ):
    super().__init__()
    self.patch_size = patch_size
    self.embedding = nn.Linear(3 * patch_size**2, width)
    self.cls = nn.Parameter(torch.zeros(1, 1, width)) if pool == 'cls' else None
    tokens = (image_size // patch_size) ** 2 + (pool == 'cls')
    self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, tokens, width))
    approximate = 'tanh' if activation == 'gelu_tanh' else 'none'
    blocks = [Block(width, num_heads, head_dim, mlp_dim, approximate) for _ in range(depth)]
    self.blocks = nn.Sequential(*blocks)
    self.norm = nn.LayerNorm(width, eps=1e-6)
    self.head = nn.Linear(width, num_classes)

  def forward(self, image_BCHW):
    x, p = image_BCHW, self.patch_size
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
    x = self.embedding(x.reshape(batch, -1, p * p * channels))
    if self.cls is not None:
      x = torch.cat([self.cls.expand(batch, -1, -1), x], dim=1)
    x = self.norm(self.blocks(x + self.pos_embedding))
    return self.head(x.mean(dim=1) if self.cls is None else x[:, 0])
