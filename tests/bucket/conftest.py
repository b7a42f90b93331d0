"""Skips the tests of buckets without the packages of requirements-gcs.txt."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec('gcsfs') else ['test_*.py']
