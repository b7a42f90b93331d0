"""Describes the data that a run was trained on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
  """Properties of the training data; every checkpoint stores them.

  Attributes:
    class_names: name of each class; empty for weights without a head, and for runs without labels.
    stored_size: (height, width) of the images that the host passes to the devices; None if images
      keep their aspect ratio.
    channels: 1 (grey) or 3 (RGB).
    train_examples: number of training examples. The order of the examples depends on this number.
    fingerprint: hash of the file paths and labels in the split `train`; empty if unknown.
    multi_label: whether an image can have any number of labels, from none to all classes.
  """

  class_names: tuple[str, ...]
  stored_size: tuple[int, int] | None
  channels: int
  train_examples: int = 0
  fingerprint: str = ''
  multi_label: bool = False

  @classmethod
  def load(cls, saved: dict) -> 'Task':
    """Restores a task from the value of the key `task` in a checkpoint's item `config`."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
