"""Child process: downloads and prepares a TFDS dataset, or converts one from TFRecord.

    python -m vit_jax.prepare NAME DATA_DIR CONVERTED_DIR

The only module that imports TensorFlow. `NAME` is prepared below DATA_DIR as array_record;
one that lies there as TFRecord is copied, record by record, to CONVERTED_DIR.
"""

import json
import os
import pathlib
import shutil
import sys


def main() -> None:
  name, root, converted = sys.argv[1:]
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import downloader

  # TFDS tries a download ten times, ever slower: without a network that is three minutes
  # of silence before the error.
  downloader.MAX_RETRIES = 4
  builder = tfds.builder(name, data_dir=root)
  if not builder.info.splits:
    builder = tfds.builder(name, data_dir=root, file_format='array_record')
    builder.download_and_prepare()
  elif builder.info.file_format.value == 'tfrecord':
    source = pathlib.Path(builder.data_dir)
    convert(source, pathlib.Path(converted) / source.relative_to(root))
  else:
    sys.exit(f'prepared as {builder.info.file_format.value}; array_record or tfrecord is needed')


def convert(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a prepared folder, its TFRecord files as array_record; complete or not there."""
  from array_record.python import array_record_module
  import tensorflow as tf

  partial = target.with_name(target.name + '.incomplete')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
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
    main()
  except Exception as error:  # the parent shows the last line
    sys.exit(f'{type(error).__name__}: {" ".join(str(error).split())}')
