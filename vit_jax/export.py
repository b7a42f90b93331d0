"""Trained or published weights, written for another code base."""

import pathlib

from vit_jax import pretrained


def run(path: str | pathlib.Path, format: str, out: pathlib.Path) -> list[pathlib.Path]:
  """Writes the weights at `path` (all that `pretrained.load` reads) into the folder `out`.

  Returns:
    The files there.

  Raises:
    ValueError: weights that can't be read, or that the format can't hold.
  """
  loaded = pretrained.adapt(pretrained.read(path), tokens=False)
  pretrained.save(
    loaded.model,
    loaded.params,
    out,
    format=format,
    preprocessing=loaded.preprocessing,
    class_names=loaded.class_names,
  )
  return sorted(out.iterdir())
