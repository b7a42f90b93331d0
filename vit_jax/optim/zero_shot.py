"""Classes that are given as text embeddings, for zero-shot classification with CLIP and SigLIP.

The text tower and the image tower must come from the same checkpoint. The user computes the
embeddings with the text tower, and writes an npz file with these arrays:
  * `names` `[L]`: the name of each class.
  * `embeddings` `[L, D]`: the text embedding of each class, normalised or not.
  * `logit_scale`: the factor of the cosine similarity between an image and a class.
  * `logit_bias`, only for SigLIP: a number that is added to every logit.

Decisions:
  * The head is an ordinary linear layer on normalised features (`ViT.cosine`), so all modes and
    exported programs support the head.
  * `logit_scale` is the factor itself, which is at most 100 in CLIP (Radford et al. 2021,
    2103.00020, Section 2.5). Checkpoints of CLIP and SigLIP store the logarithm of the factor
    instead, so a value that looks like a logarithm is refused.
  * With `logit_bias`, each class has its own probability, the sigmoid of its logit (Zhai et al.
    2023, 2303.15343, Algorithm 1). Without `logit_bias`, the probabilities are the softmax of the
    logits.
  * An unknown array is refused, because a misspelt `logit_bias` would change all probabilities.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.model import ViT
from vit_jax.names import abridged

log = logging.getLogger(__name__)

ARRAYS = ('names', 'embeddings', 'logit_scale')
# Valid range of `logit_scale`. Its initial value is 14.3 in CLIP and 10 in SigLIP, and training
# increases it. The logarithm of `LARGEST` is 6.9, so the logarithm of a valid value is never valid.
SMALLEST, LARGEST = 7.0, 1000.0


@dataclasses.dataclass(frozen=True)
class TextClasses:
  """Classes with their text embeddings.

  Attributes:
    origin: name of the file, for messages.
    names: name of each class.
    embedding_LD: text embedding of each class, scaled to length 1, in float64.
    scale: factor of the cosine similarity between an image and a class.
    bias: number to add to each logit. With a bias, the probability of a class is the sigmoid of its
      logit. None: no bias; the probabilities are the softmax of the logits.
  """

  origin: str
  names: tuple[str, ...]
  embedding_LD: np.ndarray
  scale: float
  bias: float | None = None

  @classmethod
  def read(cls, arrays: Mapping[str, np.ndarray], origin: str) -> 'TextClasses':
    """Creates the classes from the arrays of an npz file (see the module's docstring).

    Args:
      arrays: the arrays, by name.
      origin: name of the file, for messages.

    Raises:
      ValueError: an array is missing, unknown, not finite, or has the wrong type or shape; or two
        classes have the same name; or an embedding is zero.
    """
    missing = [name for name in ARRAYS if name not in arrays]
    unknown = sorted(arrays.keys() - {*ARRAYS, 'logit_bias'})
    if missing or unknown:
      raise ValueError(
        f'{origin}: expected the arrays {", ".join(ARRAYS)} and, only for SigLIP, logit_bias. '
        f'Missing: {", ".join(missing) or "none"}. Unknown: {abridged(unknown) or "none"}.'
      )
    names, embedding_LD = check_names(arrays['names'], origin), arrays['embeddings']
    if embedding_LD.ndim != 2 or embedding_LD.dtype.kind != 'f' or not embedding_LD.size:
      raise ValueError(
        f'{origin}: embeddings: expected floating-point numbers [classes, width], got '
        f'{embedding_LD.dtype} {list(embedding_LD.shape)}.'
      )
    if len(embedding_LD) != len(names):
      raise ValueError(
        f'{origin}: names has {len(names)} entries, but embeddings has {len(embedding_LD)} rows. '
        'Write one row for each name.'
      )
    embedding_LD = embedding_LD.astype(np.float64)
    length_L1 = np.linalg.norm(embedding_LD, axis=1, keepdims=True)
    if bad := [names[i] for i in np.flatnonzero(~(np.isfinite(length_L1) & (length_L1 > 0)))]:
      raise ValueError(f'{origin}: embeddings are zero or not finite for: {abridged(bad)}.')
    bias = number(arrays, 'logit_bias', origin) if 'logit_bias' in arrays else None
    return cls(origin, names, embedding_LD / length_L1, check_scale(arrays, origin), bias)

  def matching(self, class_names: Sequence[str], source: str, multi_label: bool) -> 'TextClasses':
    """Returns a copy with only the classes of a dataset, in the order of the dataset.

    Args:
      class_names: classes of the dataset, such as names of folders.
      source: name of the dataset, for the message.
      multi_label: whether an image of the dataset can have several labels.

    Raises:
      ValueError: a class of the dataset is missing, or images can have several labels although
        `bias` is None. Without a bias, the model uses a softmax, which allows only one label.
    """
    if multi_label and self.bias is None:
      raise ValueError(
        f'{self.origin}: the images of {source} can have several labels. Without logit_bias, the '
        'model uses a softmax, which allows one label. Use a SigLIP model and store its logit_bias.'
      )
    rows = {name: i for i, name in enumerate(self.names)}
    if missing := [name for name in class_names if name not in rows]:
      raise ValueError(
        f'{self.origin}: no embeddings for {len(missing)} of the {len(class_names)} classes of '
        f'{source}: {abridged(missing)}. The file has: {abridged(self.names)}. Each class of '
        'the data needs an entry in `names` with exactly its name. The text that was embedded, '
        "such as 'a photo of a cat', does not matter."
      )
    if others := [name for name in self.names if name not in {*class_names}]:
      text = '%s: these classes are ignored, because %s does not have them: %s.'
      log.info(text, self.origin, source, abridged(others))
    index_L = [rows[name] for name in class_names]
    return dataclasses.replace(
      self, names=tuple(class_names), embedding_LD=self.embedding_LD[index_L]
    )

  def attach(self, model: ViT, params: dict, image_shape: tuple[int, int, int]) -> tuple[ViT, dict]:
    """Adds a head with these text embeddings to a model; returns the new model and parameters.

    Args:
      model: a model without a head.
      params: parameters of the model.
      image_shape: (H, W, C) of the images.

    Raises:
      ValueError: the model already has a classification head, or its features are not as wide as
        the embeddings.
    """
    classes, width = self.embedding_LD.shape
    if model.num_classes is not None:
      raise ValueError(
        f'{self.origin}: zero-shot classes need weights without a head, but these weights have a '
        f'head for {model.num_classes} classes. Use the image tower of CLIP or SigLIP.'
      )
    image_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    found = jax.eval_shape(model.apply, {'params': params}, image_BHWC).shape[-1]
    if found != width:
      raise ValueError(
        f'{self.origin}: the embeddings have width {width}, but the features of the images have '
        f'width {found}. Use the text tower and the image tower of the same checkpoint. For CLIP, '
        'use text embeddings after the text projection, and image weights that include the image '
        'projection (CLIPModel or CLIPVisionModelWithProjection).'
      )
    head = {
      'kernel': (self.scale * self.embedding_LD.T).astype(np.float32),
      'bias': np.full(classes, self.bias or 0.0, np.float32),
    }
    return model.clone(num_classes=classes, cosine=True), params | {'head': head}


def check_names(names: np.ndarray, origin: str) -> tuple[str, ...]:
  """Returns the array `names` of a file as a tuple of texts.

  Raises:
    ValueError: a name is empty, occurs twice, or is not a text.
  """
  if names.ndim != 1 or names.dtype.kind != 'U':
    raise ValueError(
      f'{origin}: names: expected an array of texts, one for each class, got {names.dtype} '
      f'{list(names.shape)}. Write names=["cat", "dog"].'
    )
  names = tuple(map(str, names))
  if twice := sorted({name for name in names if names.count(name) > 1 or not name.strip()}):
    raise ValueError(f'{origin}: names are empty or occur twice: {abridged(twice)!r}.')
  return names


def number(arrays: Mapping[str, np.ndarray], name: str, origin: str) -> float:
  """Returns the only number in the array `name`.

  Raises:
    ValueError: the array does not have exactly one number, or the number is not finite.
  """
  value = arrays[name]
  if value.size != 1 or value.dtype.kind not in 'fiu' or not np.isfinite(value).all():
    raise ValueError(
      f'{origin}: {name}: expected one finite number, got {value.dtype} {list(value.shape)}'
      + (f' {value.item()}.' if value.size == 1 else '.')
    )
  return float(value.item())


def check_scale(arrays: Mapping[str, np.ndarray], origin: str) -> float:
  """Returns `logit_scale`, the factor of the cosine similarity.

  Raises:
    ValueError: the value is not between `SMALLEST` and `LARGEST`, e.g. because it is the logarithm
      of the factor.
  """
  value = number(arrays, 'logit_scale', origin)
  if SMALLEST <= value <= LARGEST:
    return value
  hint = ''
  if 0 < value < SMALLEST:
    hint = (
      ' The value looks like the logarithm of this factor. Checkpoints store the logarithm, but '
      f'this file needs the factor itself: {np.exp(value):.6g}.'
    )
  raise ValueError(
    f'{origin}: logit_scale={value:.6g}: expected a number from {SMALLEST:g} to {LARGEST:g}, the '
    f'factor by which cosine similarities are multiplied.{hint}'
  )
