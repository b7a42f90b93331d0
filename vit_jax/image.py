"""Image files to uint8 arrays, on the host. What the device does to them is in `augment.py`."""

import glob
import io
import pathlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')  # whatever the name; of others some run programs, as EPS


class BadImage(ValueError):
  """A file that can't be decoded; the message names it and says why."""


def is_image(path: pathlib.Path) -> bool:
  """Whether it is a file with the name of an image, and not a hidden one."""
  named = path.suffix.lower() in EXTENSIONS and not path.name.startswith('.')
  return named and path.is_file()


def read(path: pathlib.Path) -> bytes:
  """The file's bytes.

  Raises:
    BadImage: it can't be read.
  """
  try:
    return path.read_bytes()
  except OSError as error:
    raise BadImage(f'{path}: {error.strerror}.') from error


def decode(
  encoded: bytes, name: object, channels: int = 3, max_pixels: int | None = None
) -> Image.Image:
  """Decodes to an upright 8-bit image with 1 (grey) or 3 (RGB) channels.

  EXIF rotation is applied, transparency laid over white, 16-bit grey scaled to 8.

  Raises:
    BadImage: not an image, one cut short, of a kind that has no 8-bit form, or of more than
      `max_pixels`; None for what Pillow takes for a decompression bomb.
  """
  try:
    opened = Image.open(io.BytesIO(encoded), formats=FORMATS)  # the header only
    if max_pixels and opened.width * opened.height > max_pixels:
      raise ValueError(f'{opened.width}x{opened.height} pixels, at most {max_pixels:,} are taken')
    return convert(ImageOps.exif_transpose(opened), channels)
  except Exception as error:  # Pillow's decoders let many kinds through
    reason = 'empty file' if not encoded else str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError) and encoded:
      reason = 'of no known format'  # Pillow's own message names a memory address
    raise BadImage(f'{name}: not a readable image ({reason}).') from error


def convert(image: Image.Image, channels: int) -> Image.Image:
  """Any mode to 8-bit grey or RGB."""
  if image.mode == 'F':
    raise ValueError('floating-point pixels, whose range is unknown')
  if image.mode.startswith('I'):  # 16-bit grey
    grey = np.asarray(image).astype(np.float32) / 257
    image = Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image.convert('L' if channels == 1 else 'RGB')


def fit(
  image: Image.Image,
  size: tuple[int, int],
  interpolation: str = 'bicubic',
  crop: float = 1.0,
  stretch: bool = False,
) -> np.ndarray:
  """Scales to `size` (height, width): `image_HWC`, uint8.

  Args:
    image: grey or RGB.
    size: wanted.
    interpolation: one of `INTERPOLATIONS`, averaging where it makes smaller.
    crop: part of the shorter side that is kept, about the centre.
    stretch: scale height and width by themselves; else the longer side is cut.
  """
  height, width = size
  method = INTERPOLATIONS[interpolation]
  if image.size == (width, height) and crop == 1:
    pass
  elif stretch:
    left, top = (n * (1 - crop) / 2 for n in image.size)
    box = left, top, image.width - left, image.height - top
    image = image.resize((width, height), method, box)
  else:
    image = ImageOps.fit(image, (width, height), method, bleed=(1 - crop) / 2)
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array


INTERPOLATIONS = {method.name.lower(): method for method in Image.Resampling}


def find(paths: list[str]) -> list[pathlib.Path]:
  """The files named, and the images in the folders and patterns (`photos/*.jpg`) named, sorted.

  Raises:
    ValueError: no path, or a folder or a pattern without images.
  """
  if not paths:
    raise ValueError('No images are named: give --images=file.png,folder/, comma-separated.')
  found = []
  for path in map(pathlib.Path, paths):
    path = path.expanduser()
    if not path.exists() and any(sign in str(path) for sign in '*?['):
      inside = sorted(p for p in map(pathlib.Path, glob.glob(str(path), recursive=True)))
      inside = [p for p in inside if is_image(p)]
      if not inside:
        raise ValueError(f'{path}: no image has such a name (looked for {", ".join(EXTENSIONS)}).')
      found += inside
    elif path.is_dir():
      inside = sorted(p for p in path.rglob('*') if is_image(p))
      if not inside:
        raise ValueError(f'{path}: no images in this folder (looked for {", ".join(EXTENSIONS)}).')
      found += inside
    else:
      found.append(path)
  return found


def save(image_HWC: np.ndarray, path: pathlib.Path) -> None:
  """Writes a uint8 array as PNG."""
  Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC).save(path)
