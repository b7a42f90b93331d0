"""Writes the example code of a model card: lines that read an image or find its labels."""

from collections.abc import Sequence

from vit_jax.weights.formats import Preprocessing, Pretrained


def label_lines(loaded: Pretrained) -> str:
  """Returns Python code that computes `labels`, a list of class ids, from a tensor `logits`.

  The code uses PyTorch. The thresholds of the classes come from `loaded`; the default is 0.5.
  """
  found = loaded.calibration
  thresholds = list(found.thresholds) if found.examples else 0.5
  return (
    f'thresholds = torch.tensor({thresholds})\n'
    'labels = (logits.sigmoid() >= thresholds).nonzero().flatten().tolist()'
  )


def upright(channels: int) -> str:
  """Returns Python code that reads `image.png` into `image`, like `vit_jax.data.decode_image`."""
  mode = 'L' if channels == 1 else 'RGB'
  return f"""image = ImageOps.exif_transpose(Image.open('image.png'))
if image.mode.startswith('I'):  # 16-bit grey
  image = image.convert('I').point(lambda value: value / 257 + 0.5).convert('L')
elif image.has_transparency_data:  # shown on white
  image = image.convert('RGBA')
  image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
image = image.convert('{mode}')"""


def prepare_lines(p: Preprocessing, channels: int, size: Sequence[int]) -> str:
  """Returns Python code that reads `image.png`, rotates it as its EXIF data says, and resizes it.

  The variable of the image is `image`.

  Args:
    p: preprocessing of the model.
    channels: number of channels of the image.
    size: (height, width) of the resized image.
  """
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
