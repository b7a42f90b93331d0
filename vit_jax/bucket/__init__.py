"""Reads and writes objects in buckets of Google Cloud Storage (`gs://bucket/name`).

Paths in buckets are represented by `etils.epath.Path`, which has the methods of `pathlib.Path` that
this project uses. Only this package imports gcsfs, the client library for buckets.
"""

from vit_jax.bucket.errors import NoAnswer, NoBucket, why_refused
from vit_jax.bucket.lease import Lease, Lost
from vit_jax.bucket.listing import Listed, keeping_lists, kept_lists, listed_folder
from vit_jax.bucket.objects import contents, delete_all, downloaded, list_below, move, put
from vit_jax.bucket.paths import absolute, is_remote, join_paths, local_only, to_path
from vit_jax.bucket.records import Mirror

__all__ = [
  'Lease',
  'Listed',
  'Lost',
  'Mirror',
  'NoAnswer',
  'NoBucket',
  'absolute',
  'contents',
  'delete_all',
  'downloaded',
  'is_remote',
  'join_paths',
  'keeping_lists',
  'kept_lists',
  'list_below',
  'listed_folder',
  'local_only',
  'move',
  'put',
  'to_path',
  'why_refused',
]
