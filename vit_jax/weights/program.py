"""Writes programs: a model with its weights and its preprocessing in one file.

A program runs without this package. In both formats, StableHLO and ONNX, it takes one argument:
uint8 images `[b, H, W, C]`, for any batch size `b`. The images must already have the size H x W;
`model.json` next to the file describes how to resize them. The program returns float32 logits
`[b, L]`, or the pooled features if the model has no head. This module writes StableHLO;
`onnx_program.py` writes ONNX.

Decisions:
  * Programs return logits, because probabilities can be computed from logits, but logits cannot be
    computed from probabilities. The logits are already divided by the calibration's temperature, so
    their softmax gives the probabilities that `predict` prints. For zero-shot classification with
    SigLIP, and for images with several labels, the probability is the sigmoid of a logit instead.
    In these two cases, `model.json` has `probabilities: sigmoid`. For images with several labels,
    `model.json` also has the thresholds.
  * The default precision is float32, even if training used bfloat16. StableHLO asks for full
    precision, because matrix products on a GPU or a TPU have less precision by default.
  * In every precision, the input is uint8 and the output is float32, so the same code can run a
    program in any precision.
  * `backend.portable` makes the program independent of the machine that writes it.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from vit_jax.augment import normalize
from vit_jax.distributed import portable
from vit_jax.model import ViT
from vit_jax.weights.formats import Preprocessing, Pretrained
from vit_jax.weights.layouts import image_channels
from vit_jax.weights.usage import prepare_lines
from vit_jax.workdir import Calibration

PLATFORMS = ('cpu', 'cuda', 'tpu')
LIMIT = 2**31  # maximum size of a serialized program, in bytes


@dataclasses.dataclass(frozen=True)
class Precision:
  """A precision below float32 in which a program can be written.

  Attributes:
    convert: `(program, folder, converted) -> None` writes the program in this precision into the
      folder `converted`. The folder `folder` contains the program in float32.
    calibrates: whether `convert` needs sample images (`Program.image_NHWC`).
  """

  convert: Callable[['Program', pathlib.Path, pathlib.Path], None]
  calibrates: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
  """A model with its weights, preprocessing, class names and calibration, to be written to a file.

  Attributes:
    model: the model.
    params: parameters of the model.
    preprocessing: image preprocessing of the model.
    class_names: names of the classes, in the order of the logits; None if they are unknown.
    calibration: settings that turn logits into probabilities.
    image_NHWC: uint8 sample images, on which the ranges of activations are measured for int8.
  """

  model: ViT
  params: dict
  preprocessing: Preprocessing
  class_names: tuple[str, ...] | None
  calibration: Calibration = dataclasses.field(default_factory=Calibration)
  image_NHWC: np.ndarray | None = None

  def check(self, what: str) -> None:
    """Raises ValueError if class names or thresholds do not fit the number of classes.

    The message begins with `what`.
    """
    count = self.model.num_classes
    facts = {'class names': self.class_names, 'thresholds': self.calibration.thresholds}
    for name, values in facts.items():
      if values is not None and len(values) != count:
        raise ValueError(
          f'{what}: got {len(values)} {name} for {count} classes. Give one for each class.'
        )

  def check_images(self, what: str) -> None:
    """Raises ValueError if `image_NHWC` has no images, or images that do not fit the model.

    `what` is the start of the message.
    """
    found = self.image_NHWC
    fits = found is not None and (found.dtype, found.shape[1:]) == (np.uint8, self.image_shape)
    if not fits or not len(found):
      given = 'none' if found is None else f'{found.dtype} {list(found.shape)}'
      expected = ', '.join(map(str, self.image_shape))
      raise ValueError(
        f'{what}: this precision needs sample images, to measure the ranges of activations. '
        f'Expected uint8 [N, {expected}], got {given}.'
      )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Shape (H, W, C) of the input images."""
    p = self.preprocessing
    return (*(p.stored_size or p.size), image_channels(self.params))

  @property
  def output_name(self) -> str:
    """Name of the program's output: `features` for a model without a head, otherwise `logits`."""
    return 'features' if self.model.num_classes is None else 'logits'

  def arguments(self) -> tuple[jax.ShapeDtypeStruct]:
    """Returns the shape and type of the program's only argument, with a symbolic batch size."""
    (batch,) = export.symbolic_shape('b')
    return (jax.ShapeDtypeStruct((batch, *self.image_shape), jnp.uint8),)

  def function(self, dtype: jnp.dtype = jnp.float32) -> Callable[[jax.Array], jax.Array]:
    """Returns the function `image_BHWC -> output_BL`, which computes in the given type.

    The parameters are NumPy arrays, so JAX treats them as constants. JAX converts them to `dtype`
    when the program is written, and the program stores the converted arrays.
    """
    model, p = self.model.clone(dtype=dtype, remat='none'), self.preprocessing
    temperature, params = self.calibration.temperature, jax.tree.map(np.asarray, self.params)

    def program(image_BHWC):
      image_BHWC = normalize(image_BHWC, p.size, p.mean, p.std)
      output = model.apply({'params': params}, image_BHWC).astype(jnp.float32)
      # Only logits are divided by the temperature. A division by 1 would only cost time.
      scaled = model.num_classes is not None and temperature != 1
      return output / temperature if scaled else output

    return program


def save_stablehlo(program: Program, folder: pathlib.Path, dtype: jnp.dtype = jnp.float32) -> None:
  """Writes `model.stablehlo`, serialized by `jax.export`, and `model.json`.

  Raises:
    ValueError: the parameters are too large for one file.
  """
  count = sum(leaf.size for leaf in jax.tree.leaves(program.params))
  size = count * jnp.dtype(dtype).itemsize
  if size >= LIMIT - 2**24:
    raise ValueError(
      'stablehlo: a file must be smaller than 2 GiB, but the parameters take '
      f'{size / 2**30:.1f} GiB. Use another format.'
    )
  with portable(), jax.default_matmul_precision('highest'):
    function = jax.jit(program.function(dtype))
    exported = export.export(function, platforms=PLATFORMS)(*program.arguments())
  (folder / 'model.stablehlo').write_bytes(exported.serialize())
  write_about(program, folder, exported.out_avals[0].shape, jnp.dtype(dtype).name)


def save_bfloat16(program: Program, folder: pathlib.Path, converted: pathlib.Path) -> None:
  """Writes a StableHLO program that computes in bfloat16, into the folder `converted`."""
  save_stablehlo(program, converted, jnp.bfloat16)


def open_stablehlo(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the function `image_BHWC -> output_BL` of the StableHLO program in a folder."""
  data = bytearray((folder / 'model.stablehlo').read_bytes())
  function = jax.jit(export.deserialize(data).call)
  return lambda image_BHWC: np.asarray(function(image_BHWC))


def write_about(
  program: Program, folder: pathlib.Path, shape: tuple, precision: str = 'float32'
) -> None:
  """Writes `model.json`, which describes the program's input, resizing, output and classes.

  Args:
    program: the program.
    folder: folder of the program's files.
    shape: shape `[b, L]` of the output.
    precision: name of the program's precision.
  """
  p, calibration = program.preprocessing, program.calibration
  output = {'name': program.output_name, 'dtype': 'float32', 'shape': ['b', *shape[1:]]}
  if program.model.num_classes is not None:  # the program itself divides by the temperature
    output |= {'temperature': calibration.temperature}
    output |= {'thresholds': calibration.thresholds} if calibration.thresholds else {}
    output |= {'probabilities': 'sigmoid'} if calibration.sigmoid or calibration.thresholds else {}
  about = {
    'precision': precision,
    'input': {'name': 'image', 'dtype': 'uint8', 'shape': ['b', *program.image_shape]},
    'resize': {'interpolation': p.interpolation, 'crop': p.crop, 'stretch': p.stretch},
    'output': output,
    'class_names': program.class_names,
  }
  (folder / 'model.json').write_text(json.dumps(about, indent=2) + '\n', encoding='utf-8')


def python_program(loaded: Pretrained, imports: str, read: str, call: str) -> str:
  """Returns Python code that runs a program on an image.

  Args:
    loaded: the exported weights.
    imports: lines of code that import the runtime.
    read: line that opens the program.
    call: line that calls the program and sets `output`; `IMAGE` stands for the batch of one image.
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
  if not loaded.class_names:
    return '\n'.join([*lines, 'print(output)'])
  lines.append("about = json.load(open('model.json'))")
  if not loaded.multi_label:
    return '\n'.join([*lines, "print(about['class_names'][output.argmax()])"])
  return '\n'.join([
    *lines,
    'probability = 1 / (1 + np.exp(-output))',
    "thresholds = about['output']['thresholds']",
    "for name, value, threshold in zip(about['class_names'], probability, thresholds):",
    '  if value >= threshold:',
    '    print(name)',
  ])  # fmt: skip


def run_stablehlo(loaded: Pretrained) -> str:
  """Returns Python code that runs the StableHLO program with JAX, without vit_jax."""
  return python_program(
    loaded,
    'import json\n\nimport jax.export\nimport numpy as np',
    "model = jax.export.deserialize(open('model.stablehlo', 'rb').read())",
    'output = np.asarray(model.call(IMAGE))[0]',
  )
