"""Reads and writes objects in buckets of Google Cloud Storage (`gs://bucket/name`).

A path in a bucket is an `etils.epath.Path`, which has the methods of `pathlib.Path` that this
project uses. No other package knows gcsfs.
"""

from vit_jax.bucket.client import NoBucket, reason
from vit_jax.bucket.lease import Lease, Lost
from vit_jax.bucket.listing import Listed, keeping_lists, list_files, listed
from vit_jax.bucket.objects import contents, downloaded, list_below, move, put, remove
from vit_jax.bucket.paths import absolute, is_remote, joined, local_only, to_path
from vit_jax.bucket.records import Mirror

__all__ = [
  'Lease',
  'Listed',
  'Lost',
  'Mirror',
  'NoBucket',
  'absolute',
  'contents',
  'downloaded',
  'is_remote',
  'joined',
  'keeping_lists',
  'list_below',
  'list_files',
  'listed',
  'local_only',
  'move',
  'put',
  'reason',
  'remove',
  'to_path',
]
