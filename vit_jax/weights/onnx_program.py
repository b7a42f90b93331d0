"""Writes programs as ONNX, in float32, fp16 or int8; `program.py` describes the programs.

Decisions:
  * With JAX 0.4.36 and later, `jax2onnx` is the only converter to ONNX. The other converter,
    tf2onnx, needs a mode of `jax2tf` (without XLA) that JAX removed. A converted model is refused
    if its outputs differ from JAX's outputs by more than `TOLERANCE`.
  * For fp16 and int8, onnxruntime's own tools convert the float32 file.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import pathlib
import tempfile

import jax
import numpy as np

from vit_jax.distributed import portable
from vit_jax.weights.formats import Format, Pretrained
from vit_jax.weights.program import (
  Precision,
  Program,
  open_stablehlo,
  python_program,
  run_stablehlo,
  save_bfloat16,
  save_stablehlo,
  write_about,
)

FILE = 'model.onnx'
OPSET = 20  # the converter's default of 23 needs a newer onnxruntime than 1.18
# Arrays of at least this number of bytes are stored in `model.onnx.data`, as `jax2onnx` does.
SPILLED = 2**20
# Operators that become int8. The two products of attention (`Einsum`) stay in float32.
LAYERS = ('Gemm', 'MatMul', 'Conv')
BATCH = 32  # number of images in a batch while ranges of activations are measured
# Maximum difference between the outputs of ONNX and JAX. If JAX's largest absolute output is above
# 1, the difference is first divided by this output.
TOLERANCE = 1e-4

CONVERTER = (
  'onnx: the converter is not installed (%s). After installing requirements.txt, run\n'
  '    pip install --no-deps -r requirements-onnx.txt'
)


def save_onnx(program: Program, folder: pathlib.Path) -> None:
  """Writes `model.onnx` and `model.json`, and for large models also `model.onnx.data`.

  Raises:
    ValueError: the converter is missing or fails, or the converted model gives different outputs.
  """
  path = folder / FILE
  with quiet('jax2onnx', 'onnx_ir'):
    try:
      from jax2onnx import to_onnx
      import onnxruntime  # noqa: F401
    except ImportError as error:
      raise ValueError(CONVERTER % error) from error
    try:
      with portable():
        to_onnx(
          program.function(),
          list(program.arguments()),
          model_name='vit_jax',
          return_mode='file',
          output_path=str(path),
          input_names=['image'],
          output_names=[program.output_name],
          opset=OPSET,
          normalization_mode='prefer_native',
        )
    except Exception as error:  # the converter raises many types of errors
      raise ValueError(f'onnx: the converter failed: {type(error).__name__}: {error}') from error
  write_about(program, folder, check_outputs(program, folder))


def check_outputs(program: Program, folder: pathlib.Path) -> tuple[int, int]:
  """Compares the outputs of the ONNX program in a folder with JAX's outputs for random images.

  Returns:
    The shape `[2, L]` of the outputs.

  Raises:
    ValueError: the outputs differ by more than `TOLERANCE`.
  """
  image_BHWC, name = noise(program), program.output_name
  theirs = open_onnx(folder)(image_BHWC)
  # By default, GPUs and TPUs round the inputs of matrix products, with errors above `TOLERANCE`.
  with jax.default_matmul_precision('highest'):
    ours = np.asarray(program.function()(image_BHWC))
  error = np.abs(theirs - ours).max() / max(1, np.abs(ours).max())
  if not error <= TOLERANCE:  # also refuses NaN
    raise ValueError(
      f'onnx: the {name} of the converted and the original model differ by {error:.1g}. Install '
      'the versions in requirements-onnx.txt, or use another format.'
    )
  return ours.shape


def save_fp16(program: Program, folder: pathlib.Path, converted: pathlib.Path) -> None:
  """Writes the program as ONNX in fp16; `Precision.convert` describes the arguments.

  Raises:
    ValueError: the outputs are not finite, because a value exceeds the range of fp16.
  """
  from onnxruntime.transformers.float16 import convert_float_to_float16

  finish(
    program, convert_float_to_float16(str(folder / FILE), keep_io_types=True), converted, 'fp16'
  )


def save_int8(program: Program, folder: pathlib.Path, converted: pathlib.Path) -> None:
  """Writes the program as ONNX in int8; `Precision.convert` describes the arguments.

  The weights of linear layers and convolutions are int8, with one scale for each output of a layer.
  They use only 7 bits, because CPUs without VNNI instructions add two 8-bit products in 16 bits.
  Activations are uint8. The range of an activation is measured on the program's sample images.

  Raises:
    ValueError: the outputs are not finite.
  """
  import onnx
  from onnxruntime import quantization

  images = Images(program.image_NHWC)
  with quiet(None), tempfile.TemporaryDirectory() as scratch:
    prepared, quantized = (pathlib.Path(scratch) / name for name in ('prepared.onnx', FILE))
    large = data_of(folder / FILE).exists()
    model = without_zeros(onnx.load(folder / FILE))
    quantization.quant_pre_process(model, prepared, save_as_external_data=large)
    quantization.quantize_static(
      prepared,
      quantized,
      images,
      op_types_to_quantize=list(LAYERS),
      per_channel=True,
      activation_type=quantization.QuantType.QUInt8,
      weight_type=quantization.QuantType.QInt8,
      reduce_range=True,  # only 7 bits for weights: sums of 8-bit products overflow on older CPUs
      use_external_data_format=large,
    )
    finish(program, onnx.load(quantized), converted, 'int8')


def without_zeros(model):
  """Removes the scalar zeros that the converter adds as biases of matrix products.

  onnxruntime cannot quantize such a scalar if each output of a layer has its own scale. The removal
  does not change the outputs of the model, because the real bias of a layer is added in a separate
  operation. The given `onnx.ModelProto` is changed in place and returned.
  """
  import onnx

  graph = model.graph
  zeros = {x.name for x in graph.initializer if not x.dims and not onnx.numpy_helper.to_array(x)}
  for node in graph.node:
    if node.op_type == 'Gemm' and len(node.input) == 3 and node.input[2] in zeros:
      node.input.pop()
  used = {name for node in graph.node for name in node.input}
  for unused in [x for x in graph.initializer if x.name in zeros - used]:
    graph.initializer.remove(unused)
  return model


class Images:
  """Reader that passes batches of sample images to onnxruntime's calibration of int8 ranges."""

  def __init__(self, image_NHWC: np.ndarray):
    starts = range(0, len(image_NHWC), BATCH)
    self.batches = iter([image_NHWC[start : start + BATCH] for start in starts])

  def get_next(self) -> dict[str, np.ndarray] | None:
    """Returns the inputs of the next call, `{'image': image_BHWC}`; None after the last batch."""
    image_BHWC = next(self.batches, None)
    return None if image_BHWC is None else {'image': image_BHWC}


def finish(program: Program, model, folder: pathlib.Path, precision: str) -> None:
  """Writes a model that was converted to a lower precision, and its `model.json`.

  Args:
    program: the program.
    model: the converted `onnx.ModelProto`.
    folder: folder of the files.
    precision: name of the precision.

  Raises:
    ValueError: the outputs for random images are not finite.
  """
  import onnx

  data = data_of(folder / FILE)
  onnx.save_model(
    model, folder / FILE, save_as_external_data=True, location=data.name, size_threshold=SPILLED
  )
  if data.exists() and not data.stat().st_size:
    data.unlink()
  output = open_onnx(folder)(noise(program))
  if not np.isfinite(output).all():
    raise ValueError(
      f'--precision={precision}: the outputs are not finite, because some values exceed the range '
      'of this precision. Choose another precision.'
    )
  write_about(program, folder, output.shape, precision)


def data_of(file: pathlib.Path) -> pathlib.Path:
  """Returns the path of the file with a large model's arrays; small models have no such file."""
  return file.with_name(f'{file.name}.data')


def noise(program: Program) -> np.ndarray:
  """Returns two random images for the program: uint8 `[2, H, W, C]`."""
  return np.random.RandomState(0).randint(0, 256, (2, *program.image_shape), np.uint8)


def open_onnx(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the function `image_BHWC -> output_BL` that runs a folder's ONNX program on the CPU."""
  import onnxruntime

  session = onnxruntime.InferenceSession(folder / FILE, providers=['CPUExecutionProvider'])
  return lambda image_BHWC: session.run(None, {'image': image_BHWC})[0]


def run_onnx(loaded: Pretrained) -> str:
  """Returns Python code that runs the ONNX program with onnxruntime."""
  return python_program(
    loaded,
    'import json\n\nimport numpy as np\nimport onnxruntime',
    "model = onnxruntime.InferenceSession('model.onnx')",
    "output = model.run(None, {'image': IMAGE})[0][0]",
  )


@contextlib.contextmanager
def quiet(*names: str | None) -> Iterator[None]:
  """Context manager that silences warnings of the named loggers; None names the root logger.

  The converters to ONNX print many warnings.
  """
  loggers = [logging.getLogger(name) for name in names]
  before = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    for logger, level in zip(loggers, before):
      logger.setLevel(level)


# Formats of programs, by their --format name. To add a precision, add an entry.
PROGRAMS = {
  'stablehlo': Format(
    save_stablehlo,
    run_stablehlo,
    ('*.stablehlo',),
    opens=open_stablehlo,
    precisions={'bfloat16': Precision(save_bfloat16)},
  ),
  'onnx': Format(
    save_onnx,
    run_onnx,
    ('*.onnx*',),
    opens=open_onnx,
    precisions={'fp16': Precision(save_fp16), 'int8': Precision(save_int8, calibrates=True)},
  ),
}
