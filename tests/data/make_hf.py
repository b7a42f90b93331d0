"""Writes `hf_deit` and `hf_dinov2`: all parameters random, and the logits of two random images.

Run it as `python tests/data/make_hf.py`, with `pip install -r requirements-peers.txt`.
Transformers 5.24.0 and PyTorch on a CPU wrote the files that are committed.
"""

import pathlib

import numpy as np
import torch
import transformers

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, patch_size=7, num_labels=4)


def write(name: str, kind: type, **fields: int) -> None:
  """Writes one folder: `config.json`, `model.safetensors` and `io.npz`."""
  torch.manual_seed(0)
  model = kind(kind.config_class(**SIZES, image_size=28, **fields)).eval()
  folder = pathlib.Path(__file__).parent / name
  image_BHWC = np.random.RandomState(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn(parameter.shape))
    output_BL = model(torch.tensor(image_BHWC.transpose(0, 3, 1, 2))).logits.numpy()
  model.save_pretrained(folder)
  np.savez(folder / 'io.npz', image=image_BHWC, output=output_BL)


if __name__ == '__main__':
  write('hf_deit', transformers.DeiTForImageClassificationWithTeacher, intermediate_size=48)
  write('hf_dinov2', transformers.Dinov2ForImageClassification, mlp_ratio=2)
