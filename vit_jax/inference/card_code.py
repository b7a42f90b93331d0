"""The few lines of Python in a model card that run the model."""

from collections.abc import Sequence

from vit_jax.weights import Preprocessing, Pretrained, image_channels


def upright(channels: int) -> str:
  """`image`, a PIL image as people see it: a camera may say in EXIF which way it was held."""
  mode = 'L' if channels == 1 else 'RGB'
  return f"image = ImageOps.exif_transpose(Image.open('image.png')).convert('{mode}')"


def prepare_lines(p: Preprocessing, channels: int, size: Sequence[int]) -> str:
  """`image`, upright and of the size wanted."""
  opened = upright(channels)
  method = f'Image.Resampling.{p.interpolation.upper()}'
  shape = f'({size[1]}, {size[0]}), {method}'
  if not p.stretch:
    bleed = f', bleed={(1 - p.crop) / 2:.6g}' if p.crop < 1 else ''
    return f'{opened}\nimage = ImageOps.fit(image, {shape}{bleed})'
  if p.crop == 1:
    return f'{opened}\nimage = image.resize({shape})'
  cut = f'w * {(1 - p.crop) / 2:.6g}, h * {(1 - p.crop) / 2:.6g}'
  end = f'w * {(1 + p.crop) / 2:.6g}, h * {(1 + p.crop) / 2:.6g}'
  return f'{opened}\nw, h = image.size\nimage = image.resize({shape}, ({cut}, {end}))'


def python_program(loaded: Pretrained, imports: str, read: str, call: str) -> str:
  """For `model.json` and a file of a program."""
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
  """With JAX alone."""
  return python_program(
    loaded,
    'import json\n\nimport jax.export\nimport numpy as np',
    "model = jax.export.deserialize(open('model.stablehlo', 'rb').read())",
    'output = np.asarray(model.call(IMAGE))[0]',
  )


def run_onnx(loaded: Pretrained) -> str:
  """With onnxruntime."""
  return python_program(
    loaded,
    'import json\n\nimport numpy as np\nimport onnxruntime',
    "model = onnxruntime.InferenceSession('model.onnx')",
    "output = model.run(None, {'image': IMAGE})[0][0]",
  )


def run_hf(loaded: Pretrained) -> str:
  """With transformers."""
  headed = loaded.model.num_classes is not None
  kind = 'AutoModelForImageClassification' if headed else 'AutoModel'
  show = 'print(model.config.id2label[model(**inputs).logits.argmax().item()])'
  return f"""from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained('.')
model = {kind}.from_pretrained('.')
{upright(image_channels(loaded.params))}
inputs = processor(image, return_tensors='pt')
{show if headed else 'print(model(**inputs).last_hidden_state)'}"""


def run_timm(loaded: Pretrained) -> str:
  """With timm."""
  show = 'print(output)'
  if loaded.class_names:
    show = "print(model.pretrained_cfg['label_names'][output.argmax()])"
  return f"""from PIL import Image, ImageOps
import timm

model = timm.create_model('local-dir:.', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{upright(image_channels(loaded.params))}
output = model(transform(image)[None])[0]
{show}"""


def run_npz(loaded: Pretrained) -> str:
  """With this package: the file has no place for what is done to an image."""
  p, channels = loaded.preprocessing, image_channels(loaded.params)
  grid = tuple(n // q for n, q in zip(p.size, loaded.model.patch_size))
  axes = '[..., None]' if channels == 1 else ''
  mean, std = (repr(list(values)) for values in (p.mean, p.std))
  return f"""import numpy as np
from PIL import Image, ImageOps
import vit_jax

model, params = vit_jax.load('model.npz'{f', grid={grid}' if grid[0] != grid[1] else ''})
{prepare_lines(p, channels, p.size)}
pixels = (np.asarray(image, np.float32){axes} / 255 - {mean}) / {std}
output = model.apply({{'params': params}}, pixels[None].astype(np.float32))[0]
print({'output.argmax()' if loaded.model.num_classes else 'output'})"""


RUN = {
  'hf': run_hf,
  'timm': run_timm,
  'npz': run_npz,
  'stablehlo': run_stablehlo,
  'onnx': run_onnx,
}
