"""Provides `small_config` of conftest.py as a config file, for processes that tests start."""

from tests.conftest import small_config as get_config  # noqa: F401
