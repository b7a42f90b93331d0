"""Records some training steps of a run with `jax.profiler`."""

from collections.abc import Iterator
import contextlib
import dataclasses
import pathlib

import jax
from ml_collections import ConfigDict

from vit_jax import limits, storage
from vit_jax.bucket import local_only
from vit_jax.distributed import is_first, start_up, target
from vit_jax.profiling.operations import operations
from vit_jax.profiling.steps import Steps
from vit_jax.profiling.table import Profile, summarize_time
from vit_jax.profiling.timeline import divide, read_trace
from vit_jax.training import check_in_all_processes
from vit_jax.workdir import write_json

WARM_UP = 3  # steps before anything is measured
RECORDED = 5  # number of steps measured with the profiler, and also of steps measured without it


@limits.memory_for('Profiling')
def profile(config: ConfigDict, workdir: str | pathlib.Path) -> Profile | None:
  """Records training steps in `<workdir>/profile/`, and returns how their time is spent.

  The folder then contains the trace for xprof, a trace for Perfetto, and `profile.json`.

  Args:
    config: config from `configs/`, or a changed `config.default_config()`.
    workdir: folder of a training run, or a new folder.

  Returns:
    The profile in process 0; None in all other processes.

  Raises:
    ValueError: the config or the data cannot be used, or the workdir is in a bucket.
  """
  workdir = local_only('--mode=profile: --workdir', workdir)
  start_up()
  check_in_all_processes(config, workdir)
  if config.freeze:
    raise ValueError(
      '--mode=profile does not support freeze=backbone. Such a run can train on stored features, '
      "and its steps then do not contain the model. To profile the model, add --config.freeze='' "
      "--config.sweep='()', and choose a new --workdir."
    )
  if config.classifier:
    raise ValueError(
      f'--mode=profile records training steps, but a run with classifier={config.classifier} has '
      'none. Profile the run that trained the backbone.'
    )
  storage.check_folder(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(names_in_cache_key())
    steps = Steps(config, workdir, stack)
    steps.take(WARM_UP)
    unrecorded = steps.take(RECORDED)
    with recording(workdir / 'profile'):
      recorded = steps.take(RECORDED)
  if not is_first():
    return None
  file = max((workdir / 'profile').rglob('*.xplane.pb'), key=lambda path: path.stat().st_mtime)
  known = operations(steps.text)
  kinds, longest = summarize_time(divide(read_trace(file), known), known, RECORDED)
  devices = f'{steps.mesh.size} {target(steps.mesh).platform}'
  found = Profile(
    1e3 * recorded / RECORDED, 1e3 * unrecorded / RECORDED, RECORDED, devices, kinds, longest
  )
  write_json(workdir / 'profile' / 'profile.json', dataclasses.asdict(found))
  return found


@contextlib.contextmanager
def names_in_cache_key() -> Iterator[None]:
  """Context manager that includes names of operations in the keys of JAX's compilation cache.

  Without these names, the cache could return a program that was compiled from an older version of
  the code. Such a program computes the same numbers, but its operations have the old names.
  """
  key = 'jax_compilation_cache_include_metadata_in_key'
  before = getattr(jax.config, key)
  jax.config.update(key, True)
  try:
    yield
  finally:
    jax.config.update(key, before)


@contextlib.contextmanager
def recording(folder: pathlib.Path) -> Iterator[None]:
  """Context manager that records a trace in process 0, but does not record Python calls."""
  if not is_first():
    yield
    return
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
    yield
