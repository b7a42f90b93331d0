"""The run of conftest.py as an experiment, for processes that tests start."""

from tests.conftest import small_config as get_config  # noqa: F401
