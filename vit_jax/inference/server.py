"""Serves the demo page: a visitor uploads an image, and sees its classes and the model's attention.

Decisions:
  * Gradio does not decode uploads, but passes their bytes to `decode_image`. If a file is not an
    image, the visitor gets an error message with the reason. File size and number of pixels are
    limited.
  * The model processes one image at a time on one device. Other requests wait in Gradio's queue.
  * The server answers only the requests that the page and the clients of its API need
    (`vit_jax/inference/gate.py`).
  * The page and the server fetch nothing from the network. The page uses system fonts, and has no
    analytics and no share link. If a client sends a URL instead of a file, the server refuses it.
  * Uploads are stored in a temporary folder, which is deleted when the server stops. Gradio writes
    all its files into this folder.
  * An invalid request causes a message to the client or one line in the log. A traceback in the log
    means that the page or Gradio has a bug.
"""

from collections.abc import Iterable, Iterator
import contextlib
import logging
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time

from vit_jax import opening, progress
from vit_jax.bucket import is_remote
from vit_jax.data import BadImage, decode_image, save_png
from vit_jax.evaluation import load_split, open_test
from vit_jax.experiment import Experiment
from vit_jax.inference.about import about
from vit_jax.inference.card import public
from vit_jax.opening import Request

log = logging.getLogger(__name__)

EXAMPLES = 8  # maximum number of example images from a split


def find_port(host: str, port: int) -> int:
  """Checks that the server can listen on an address, and returns its port.

  If `port` is 0, the result is a free port. `serve` calls this function before it loads the model,
  so that an error about the address is raised early.

  Raises:
    ValueError: the server cannot listen on this address.
  """
  try:
    with socket.create_server((host, port)) as server:
      return server.getsockname()[1]
  except (OSError, OverflowError) as error:
    raise ValueError(
      f'Cannot listen on --host={host} --port={port} ({error}). Choose another address or port.'
    ) from error


def find_examples(
  exp: Experiment, workdir: pathlib.Path | None, folder: pathlib.Path
) -> list[pathlib.Path]:
  """Returns the image files that the demo page offers as examples.

  The examples are the PNG files in the folder `examples` of the workdir. If there are none, the
  first images of the evaluation split are used. Published weights have no examples.

  Args:
    exp: the experiment of the weights.
    workdir: folder of the run; None for published weights.
    folder: local folder for images of the split. If the workdir is in a bucket, the PNG files of
      its folder `examples` are also copied to this local folder.
  """
  if workdir is None:
    return []
  if found := sorted((workdir / 'examples').glob('*.png')):
    local = [copied(file, folder) for file in found] if is_remote(workdir) else found
    return list(only_readable(local, exp.task.channels))
  try:
    test = load_split(exp, exp.config.data.eval_split, open_test(exp)[0])
    for i, image_HWC in enumerate(test.some(range(min(EXAMPLES, len(test)))).image_NHWC):
      save_png(image_HWC, folder / f'{i}.png')
  except (ValueError, OSError) as error:
    log.warning('The page has no examples: %s', error)
  return sorted(folder.glob('*.png'))


def only_readable(files: Iterable[pathlib.Path], channels: int) -> Iterator[pathlib.Path]:
  """Yields the files that are images of the given number of channels; warns about the others."""
  for file in files:
    try:
      decode_image(file.read_bytes(), str(file), channels)
    except (BadImage, OSError) as error:
      log.warning('The page leaves out an example. %s', error)
      continue
    yield file


def copied(file: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Copies a file into a local folder, and returns the path of the copy."""
  copy = folder / file.name
  copy.write_bytes(file.read_bytes())
  return copy


def clean(folder: pathlib.Path, age: float, period: float) -> None:
  """Starts a thread that deletes the files that will be written into a folder, when they are old.

  Gradio deletes only uploads that it accepted. Other uploads, such as interrupted ones, stay.

  Args:
    folder: the folder; the files that it already has are kept.
    age: seconds after which a file is deleted. This must be later than Gradio deletes its files,
      because Gradio would not forget the names of files that it does not find.
    period: seconds between two deletions.
  """
  kept = set(folder.rglob('*'))

  def repeat():
    while True:
      time.sleep(period)
      paths = [pathlib.Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
      for path in paths:
        with contextlib.suppress(OSError):  # Gradio moves and deletes files meanwhile
          if path not in kept and time.time() - path.stat().st_ctime > age:
            path.unlink()

  threading.Thread(target=repeat, daemon=True).start()


def serve(request: Request, host: str, port: int) -> None:
  """Serves the demo page of a model until the process ends.

  Args:
    request: names the model: a checkpoint of a workdir, or published weights with a head.
    host: address to listen on.
    port: port to listen on; 0: any free port.

  Raises:
    ValueError: the server cannot listen on the address, the weights do not exist, or the overrides
      do not fit the weights.
  """
  port = find_port(host, port)
  stop = lambda *_: sys.exit(0)  # a normal exit deletes the uploads
  signal.signal(signal.SIGTERM, stop)
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
    signal.signal(signal.SIGHUP, stop)
  with tempfile.TemporaryDirectory(prefix='vit_jax_uploads_') as uploads:
    os.environ['GRADIO_TEMP_DIR'] = uploads
    # Gradio reads this variable when it is imported, so these modules are not imported earlier.
    from vit_jax.inference import gate, page

    exp, params, step = opening.open_model(request)
    with progress.announced('Compiling ...'):
      viewer = page.Viewer(exp, params)
    examples = find_examples(exp, request.workdir, pathlib.Path(uploads))
    limits = about(exp, step, request.workdir, request.overrides)
    blocks = page.build(viewer, examples, f'vit_jax: {public(request.name)}', limits)
    clean(pathlib.Path(uploads), page.KEEP + page.CLEAN, page.CLEAN)
    gate.launch(blocks, host, port)
    log.info('Serving on %s', blocks.local_url)
    try:
      blocks.block_thread()
    finally:
      blocks.close(verbose=False)  # so that no upload arrives while the uploads are deleted
