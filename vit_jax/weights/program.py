"""Writes programs: a model with its weights and its preprocessing in one file.

A program runs without this package. In both formats, StableHLO and ONNX, it takes one argument:
uint8 images `[b, H, W, C]` with any `b`. The images must already have the size H x W; `model.json`
next to the file describes how to resize them. The program returns float32 logits `[b, L]`, or the
pooled features if the model has no head.

Decisions:
  * Programs return logits, because probabilities can be computed from logits, but not the reverse.
    The logits are divided by the temperature of the weights. Their softmax is therefore the
    probability that `predict` prints. If images can have several labels, it is the sigmoid of the
    logits, and `model.json` has the thresholds. It is also the sigmoid if `model.json` says so, for
    zero-shot classification with SigLIP.
  * The computation is in float32, even if training used bfloat16. StableHLO asks for full
    precision, because matrix products on a GPU or a TPU have less precision by default.
  * `backend.portable` makes the program independent of the machine that writes it.
  * With JAX 0.4.36 and later, `jax2onnx` is the only converter to ONNX. The other one, tf2onnx,
    needs a mode of `jax2tf` (without XLA) that JAX removed. The outputs of the converted model are
    compared with JAX's before the file is kept.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import logging
import pathlib

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from vit_jax.augment import normalize
from vit_jax.distributed import portable
from vit_jax.model import ViT
from vit_jax.weights.formats import Preprocessing, Pretrained, prepare_lines
from vit_jax.weights.layouts import image_channels
from vit_jax.workdir import Calibration

Program = Callable[[jax.Array], jax.Array]

PLATFORMS = ('cpu', 'cuda', 'tpu')
LIMIT = 2**31  # maximum size of a serialized program, in bytes
TOLERANCE = 1e-4  # maximum error of ONNX outputs, divided by JAX's largest output if above 1

CONVERTER = (
  'onnx: the converter is not installed (%s). After installing requirements.txt, run\n'
  '    pip install --no-deps -r requirements-onnx.txt'
)


def make_program(
  model: ViT, params: dict, preprocessing: Preprocessing, calibration: Calibration
) -> tuple[Program, tuple]:
  """Returns the program, and the shape (H, W, C) of its input images."""
  model, p = model.clone(dtype=jnp.float32, remat='none'), preprocessing

  def program(image_BHWC):
    image_BHWC = normalize(image_BHWC, p.size, p.mean, p.std)
    output = model.apply({'params': params}, image_BHWC)
    # Features have no temperature. Without a temperature, the program has no division.
    scaled = model.num_classes is not None and calibration.temperature != 1
    return output / calibration.temperature if scaled else output

  return program, (*(p.stored_size or p.size), image_channels(params))


def save_stablehlo(
  model: ViT,
  params: dict,
  folder: pathlib.Path,
  preprocessing: Preprocessing,
  class_names: tuple[str, ...] | None,
  calibration: Calibration,
) -> None:
  """Writes `model.stablehlo`, serialized by `jax.export`, and `model.json`.

  Raises:
    ValueError: the parameters are too large for one file.
  """
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  if size >= LIMIT - 2**24:
    raise ValueError(
      'stablehlo: a file must be smaller than 2 GiB, but the parameters take '
      f'{size / 2**30:.1f} GiB. Use another format.'
    )
  program, image_shape = make_program(model, params, preprocessing, calibration)
  (batch,) = export.symbolic_shape('b')
  image = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
  with portable(), jax.default_matmul_precision('highest'):
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(image)
  (folder / 'model.stablehlo').write_bytes(exported.serialize())
  output = output_of(model, exported.out_avals[0].shape, calibration)
  write_about(folder, output, image_shape, preprocessing, class_names)


def save_onnx(
  model: ViT,
  params: dict,
  folder: pathlib.Path,
  preprocessing: Preprocessing,
  class_names: tuple[str, ...] | None,
  calibration: Calibration,
) -> None:
  """Writes `model.onnx` and `model.json`, and for large models also `model.onnx.data`.

  Raises:
    ValueError: the converter is missing, or the converted model gives different outputs.
  """
  with quiet('jax2onnx', 'onnx_ir'):
    try:
      from jax2onnx import to_onnx
      import onnxruntime
    except ImportError as error:
      raise ValueError(CONVERTER % error) from error
    program, image_shape = make_program(model, params, preprocessing, calibration)
    (batch,) = export.symbolic_shape('b')
    image = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    path, name = folder / 'model.onnx', output_name(model)
    try:
      with portable():
        to_onnx(
          program,
          [image],
          model_name='vit_jax',
          return_mode='file',
          output_path=str(path),
          input_names=['image'],
          output_names=[name],
        )
    except Exception as error:  # the converter raises many types of errors
      raise ValueError(f'onnx: the converter failed: {type(error).__name__}: {error}') from error
  session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  image_BHWC = np.random.RandomState(0).randint(0, 256, (2, *image_shape), np.uint8)
  (theirs,) = session.run(None, {'image': image_BHWC})
  ours = np.asarray(program(image_BHWC))
  error = np.abs(theirs - ours).max() / max(1, np.abs(ours).max())
  if not error <= TOLERANCE:  # also refuses NaN
    raise ValueError(
      f'onnx: the {name} of the converted and the original model differ by {error:.1g}. Install '
      'the versions in requirements-onnx.txt, or use another format.'
    )
  output = output_of(model, ours.shape, calibration)
  write_about(folder, output, image_shape, preprocessing, class_names)


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
  """Silences the warnings of these loggers, because the converter prints very many of them."""
  loggers = [logging.getLogger(name) for name in names]
  before = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    for logger, level in zip(loggers, before):
      logger.setLevel(level)


def output_name(model: ViT) -> str:
  """Returns the name of the program's output."""
  return 'features' if model.num_classes is None else 'logits'


def output_of(model: ViT, shape: tuple, calibration: Calibration) -> dict[str, object]:
  """Returns what `model.json` says about the output; the program has applied the temperature."""
  about = {'name': output_name(model), 'dtype': 'float32', 'shape': ['b', *shape[1:]]}
  if model.num_classes is None:
    return about
  thresholds = {'thresholds': calibration.thresholds} if calibration.thresholds else {}
  if calibration.sigmoid:
    about |= {'probabilities': 'sigmoid'}
  return about | {'temperature': calibration.temperature} | thresholds


def write_about(
  folder: pathlib.Path,
  output: dict[str, object],
  image_shape: tuple[int, int, int],
  preprocessing: Preprocessing,
  class_names: tuple[str, ...] | None,
) -> None:
  """Writes `model.json`: the program's input, how to resize files for it, and its output."""
  p = preprocessing
  about = {
    'input': {'name': 'image', 'dtype': 'uint8', 'shape': ['b', *image_shape]},
    'resize': {'interpolation': p.interpolation, 'crop': p.crop, 'stretch': p.stretch},
    'output': output,
    'class_names': class_names,
  }
  (folder / 'model.json').write_text(json.dumps(about, indent=2) + '\n', encoding='utf-8')


def python_program(loaded: Pretrained, imports: str, read: str, call: str) -> str:
  """Returns Python code that runs a program on an image.

  Args:
    loaded: the weights.
    imports: the lines that import the runtime.
    read: the line that opens the program.
    call: the line that calls the program; `IMAGE` stands for the batch.
  """
  p, channels = loaded.preprocessing, image_channels(loaded.params)
  axes = 'None, ..., None' if channels == 1 else 'None'
  lines = [
    imports,
    'from PIL import Image, ImageOps\n',
    read,
    prepare_lines(p, channels, p.stored_size or p.size),
    call.replace('IMAGE', f'np.asarray(image)[{axes}]'),
  ]
  if loaded.class_names:
    names = "json.load(open('model.json'))['class_names']"
    return '\n'.join([*lines, f'print({names}[output.argmax()])'])
  return '\n'.join([*lines, 'print(output)'])


def run_stablehlo(loaded: Pretrained) -> str:
  """Returns Python code that runs the program with JAX, without vit_jax."""
  return python_program(
    loaded,
    'import json\n\nimport jax.export\nimport numpy as np',
    "model = jax.export.deserialize(open('model.stablehlo', 'rb').read())",
    'output = np.asarray(model.call(IMAGE))[0]',
  )


def run_onnx(loaded: Pretrained) -> str:
  """Returns Python code that runs the program with onnxruntime."""
  return python_program(
    loaded,
    'import json\n\nimport numpy as np\nimport onnxruntime',
    "model = onnxruntime.InferenceSession('model.onnx')",
    "output = model.run(None, {'image': IMAGE})[0][0]",
  )
