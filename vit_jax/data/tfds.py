"""Reads datasets of tensorflow-datasets (TFDS) without TensorFlow.

TensorFlow is needed only to prepare a dataset. The program does this in a child process:

    python -m vit_jax.data.tfds NAME DATA_DIR CONVERTED_DIR

The command downloads the dataset NAME, and writes it to DATA_DIR in the array_record format. If
DATA_DIR already has the dataset in the TFRecord format, the command instead writes a converted copy
to CONVERTED_DIR.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NoReturn

import jax

from vit_jax.bucket import is_remote, to_path
from vit_jax.data import source as source_lib
from vit_jax.data.source import Source
from vit_jax.distributed import from_first
from vit_jax.names import choose

CONVERTED = 'array_record'  # folder for converted copies; the original TFDS files stay unchanged


def open_tfds(name: str, data_dir: str, image_size: tuple[int, int]) -> Source:
  """Opens an image classification dataset of tensorflow-datasets (TFDS).

  If the dataset is missing, it is downloaded. If it is not in the array_record format, it is
  converted.

  Args:
    name: name of the dataset in TFDS, such as `cifar10`.
    data_dir: folder of the TFDS data; empty: the default that `data_root` describes.
    image_size: ignored.
  """
  del image_size
  root = data_root(name, data_dir)
  if jax.distributed.is_initialized():  # process 0 goes first, as all may share the folder
    from_first(lambda: prepared_builder(name, root) and None)
  return tfds_source(name, prepared_builder(name, root))


def data_root(name: str, data_dir: str) -> pathlib.Path:
  """Returns the folder of the TFDS data: `data_dir` or, if `data_dir` is empty, a default folder.

  The default is the value of the environment variable `TFDS_DATA_DIR`, if set. Without this
  variable, the default is `~/tensorflow_datasets`, as in TFDS.

  Raises:
    ValueError: `name` does not have the form of a dataset name.
  """
  if not re.fullmatch(r'\w+([/:].+)?', name):
    raise ValueError(f'data.source: got tfds:{name}, expected tfds:<name>, e.g. tfds:cifar10.')
  root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return to_path(root)


def tfds_source(name: str, builder) -> Source:
  """Returns a source that reads the dataset of a TFDS builder; `name` is used in messages.

  Raises:
    ValueError: the dataset is not an image classification dataset.
  """
  import tensorflow_datasets

  match builder.info.supervised_keys:
    case (str(image_key), str(label_key)):
      pass
    case _:  # missing, or nested, or with weights of the examples
      image_key, label_key = 'image', 'label'
  features, kinds = dict(builder.info.features.items()), tensorflow_datasets.features
  feature, label = features.get(image_key), features.get(label_key)
  if not isinstance(feature, kinds.Image) or not isinstance(label, kinds.ClassLabel):
    raise ValueError(
      f'tfds:{name}: expected an image and a class label, but its supervised keys '
      f'{builder.info.supervised_keys} have the types {type(feature).__name__} and '
      f'{type(label).__name__}. Choose an image classification dataset.'
    )
  directory = str(builder.data_path)  # a builder cannot be sent to a worker process

  def read(split, indices):
    try:
      records = open_records(directory, split, image_key)
      for chunk in source_lib.chunks(indices, 4096):
        for i, record in zip(chunk, records.__getitems__(chunk) if chunk else ()):
          file = f' ({record["file_name"].decode()})' if 'file_name' in record else ''
          yield f'tfds:{name}/{split}/{i}{file}', record[image_key], int(record[label_key])
    except Exception as error:  # TFDS and array_record raise many kinds of errors
      raise ValueError(
        f'tfds:{name}/{split}: {directory} cannot be read: {error}. Perhaps a shard is missing or '
        'damaged. Copy the shard again, or remove the folder so that the data is prepared again.'
      ) from error

  sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
  channels = 1 if feature.shape[-1] == 1 else 3
  return Source(sizes, tuple(label.names), channels, read)


@functools.lru_cache(maxsize=8)
def open_records(directory: str, split: str, image_key: str):
  """Opens the records of a split for access by index, without decoding their images.

  The records of the most recently used splits stay open, to save time.
  """
  import tensorflow_datasets

  decoders = {image_key: tensorflow_datasets.decode.SkipDecoding()}
  builder = tensorflow_datasets.builder_from_directory(directory)
  return builder.as_data_source(split=split, decoders=decoders)


def prepared_builder(name: str, root: pathlib.Path):
  """Returns the TFDS builder of a dataset in the array_record format.

  If there is no data in this format, `prepare` first downloads the dataset or converts it.

  Args:
    name: name of the dataset in TFDS.
    root: folder of the TFDS data. Converted copies are in its subfolder `CONVERTED`.

  Raises:
    ValueError: the dataset is unknown, or cannot be prepared.
  """
  if not find_builder(name, root):
    refuse_name(name)
  for attempt in ('find', 'prepare'):
    for directory in data_folders(name, root):
      builder = find_builder(name, directory)
      if builder and builder.info.splits and builder.info.file_format.value == 'array_record':
        return builder
    if attempt == 'find' and is_remote(root):
      raise ValueError(
        f'tfds:{name} is not prepared in {root}. On a machine with tensorflow, run the command '
        'below, and upload the resulting folder to the bucket:\n'
        f'    tfds build {name} --file_format=array_record'
      )
    if attempt == 'find':
      prepare(name, root, root / CONVERTED)
  raise AssertionError(f'{name} was prepared in {root} but cannot be found')


def data_folders(name: str, root: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders that can have a dataset: `root` and, if it exists, the converted copy's."""
  copies = root / CONVERTED
  return [root, copies] if (copies / re.split('[/:]', name)[0]).exists() else [root]


def find_builder(name: str, directory: pathlib.Path):
  """Returns the TFDS builder of a dataset; None if neither TFDS nor `directory` has the dataset.

  Raises:
    ValueError: the version or the config is unknown.
  """
  import tensorflow_datasets

  try:
    return tensorflow_datasets.builder(name, data_dir=directory)
  except tensorflow_datasets.core.DatasetNotFoundError:
    return None
  except AssertionError as error:  # TFDS raises it for an unknown version
    raise ValueError(f'data.source: tfds:{name} cannot be opened: {error}') from error


def refuse_name(name: str) -> NoReturn:
  """Raises ValueError for a name that `find_builder` did not find; the message gives the reason."""
  import tensorflow_datasets

  known = tensorflow_datasets.list_builders(with_community_datasets=False)
  dataset = choose('data.source: dataset', re.split('[/:]', name)[0], known)
  raise ValueError(
    f'data.source: got tfds:{name}, expected a version such as tfds:{dataset}:1.0.0, a config such '
    f'as tfds:{dataset}/<config>, or only tfds:{dataset}.'
  )


def prepare(name: str, root: pathlib.Path, converted: pathlib.Path) -> None:
  """Downloads or converts a dataset, by running this module in a child process.

  Raises:
    ValueError: the child failed; the message gives the reason and explains how to get the data.
  """
  logging.getLogger(__name__).info('Preparing %s in %s (only once) ...', name, root)
  command = [sys.executable, '-m', 'vit_jax.data.tfds', name, str(root), str(converted)]
  package = str(pathlib.Path(__file__).resolve().parents[2])
  path = os.pathsep.join(filter(None, [package, os.environ.get('PYTHONPATH')]))
  env = os.environ | {'PYTHONPATH': path, 'TF_CPP_MIN_LOG_LEVEL': '3'}
  child = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, errors='replace')
  if child.returncode:
    lines = [line for line in child.stderr.splitlines() if line.strip()]
    reason = lines[-1][:500] if lines else f'exit code {child.returncode}'
    raise ValueError(
      f'tfds:{name} is not prepared in {str(root)!r}, and preparing it failed: {reason}\n'
      'On a machine with network access and tensorflow, run\n'
      f'    tfds build {name} --file_format=array_record --data_dir={root}\n'
      'and copy the folder to this machine. Or set data.dir (or TFDS_DATA_DIR) to a folder with '
      'prepared data, or use data.source=folder:<path>.'
    )


def prepare_here() -> None:
  """Downloads or converts the dataset that the command line names (see the module docstring)."""
  name, root, converted = sys.argv[1:]
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import downloader

  # By default, TFDS tries a download ten times with growing pauses. Without a network, the program
  # would print nothing for three minutes before the error.
  downloader.MAX_RETRIES = 4
  builder = tfds.builder(name, data_dir=root)
  if not builder.info.splits:
    builder = tfds.builder(name, data_dir=root, file_format='array_record')
    builder.download_and_prepare()
  elif builder.info.file_format.value == 'tfrecord':
    source = pathlib.Path(builder.data_dir)
    convert_to_array_record(source, pathlib.Path(converted) / source.relative_to(root))
  else:
    found = builder.info.file_format.value
    sys.exit(f'the data has the format {found}, expected array_record or tfrecord')


def convert_to_array_record(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the TFDS folder `source` to `target`, and converts TFRecord files to array_record.

  The copy has a temporary name until it is complete, and is then renamed to `target`. If another
  process is making the same copy, this function waits for it, and makes no second copy.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  with open(target.with_name(target.name + '.lock'), 'wb') as lock:
    with contextlib.suppress(OSError):  # some network file systems have no locks
      fcntl.flock(lock, fcntl.LOCK_EX)
    if not (target / 'dataset_info.json').exists():
      write_copy(source, target)


def write_copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes the converted copy of `source` to `target`. The caller must hold the lock."""
  from array_record.python import array_record_module
  import tensorflow as tf

  partial = target.with_name(target.name + '.incomplete')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  for file in sorted(source.iterdir()):
    if '.tfrecord-' in file.name:
      path = partial / file.name.replace('.tfrecord-', '.array_record-')
      writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      for record in tf.data.TFRecordDataset(str(file)):
        writer.write(record.numpy())
      writer.close()
    elif file.name == 'dataset_info.json':
      info = json.loads(file.read_text(encoding='utf-8'))
      info['fileFormat'] = 'array_record'
      (partial / file.name).write_text(json.dumps(info, indent=2), encoding='utf-8')
    elif file.is_file():
      shutil.copy(file, partial / file.name)
  shutil.rmtree(target, ignore_errors=True)
  partial.rename(target)


if __name__ == '__main__':
  try:
    prepare_here()
  except Exception as error:  # the parent process shows the last line
    sys.exit(f'{type(error).__name__}: {" ".join(str(error).split())}')
