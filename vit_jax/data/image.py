"""Image files to uint8 arrays, on the host. What the device does to them is in `augment.py`.

Decisions:
  * Pillow opens every file, and decodes what is read once: its pixels are the reference.
  * Parts of images are decoded and scaled anew in every epoch, by OpenCV, which is faster at both
    (results/input.json). Pillow still opens them, so that there is one list of what is taken, and
    decodes all but ordinary RGB JPEGs.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import glob
import io
import math
import pathlib
import stat

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vit_jax import storage
from vit_jax.names import local

EXTENSIONS = ('.jpg', '.jpeg', '.jfif', '.png', '.webp', '.bmp')
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')  # whatever the name; of others some run programs, as EPS

Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels
Fit = Callable[[Image.Image, tuple[int, int]], np.ndarray]  # (height, width) to `image_HWC`


class BadImage(ValueError):
  """A file that can't be decoded; the message names it and says why."""


def is_image(path: pathlib.Path) -> bool:
  """Whether it is a file with the name of an image."""
  return has_image_name(path.name) and path.is_file()


def has_image_name(name: str) -> bool:
  """Whether it is the name of an image, and not of a hidden file."""
  return name.lower().endswith(EXTENSIONS) and not name.startswith('.')


def read_file(path: pathlib.Path) -> bytes:
  """The file's bytes.

  Raises:
    BadImage: it can't be read.
  """
  try:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe might never end, or begin
      raise BadImage(f'{path}: not a file.')
    return path.read_bytes()
  except OSError as error:
    raise BadImage(f'{path}: {error.strerror}.') from error


def decode_image(
  encoded: bytes, name: object, channels: int = 3, max_pixels: int | None = None
) -> Image.Image:
  """Decodes to an upright 8-bit image with 1 (grey) or 3 (RGB) channels.

  EXIF rotation is applied, transparency laid over white, 16-bit grey scaled to 8.

  Raises:
    BadImage: not an image, one cut short, of a kind that has no 8-bit form, or of more than
      `max_pixels`; None for what Pillow takes for a decompression bomb.
  """
  with refused(encoded, name):
    opened = open_header(encoded)
    if max_pixels and opened.width * opened.height > max_pixels:
      raise ValueError(f'{opened.width}x{opened.height} pixels, at most {max_pixels:,} are taken')
    return convert(ImageOps.exif_transpose(opened), channels)


def open_header(encoded: bytes) -> Image.Image:
  """An image of which nothing but the header is read."""
  return Image.open(io.BytesIO(encoded), formats=FORMATS)


def upright_size(encoded: bytes, name: object) -> tuple[int, int]:
  """Height and width of the upright image in a file, by its header alone.

  Raises:
    BadImage: the header can't be read.
  """
  with refused(encoded, name):
    opened = open_header(encoded)
    turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
    return (opened.width, opened.height) if turned else (opened.height, opened.width)


@contextlib.contextmanager
def refused(encoded: bytes, name: object) -> Iterator[None]:
  """Turns whatever decoding raises into a `BadImage`."""
  try:
    yield
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


def fit_image(
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


def refit(image_HWC: np.ndarray, size: tuple[int, int], fit: Fit) -> np.ndarray:
  """Fits an array as `fit` fits a file."""
  pixels = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
  return fit(Image.fromarray(pixels), size)


def random_part(
  uniform_4: Sequence[float], height: int, width: int, min_area: float, max_aspect: float
) -> Box:
  """A random part of an image, drawn as `augment.resized_crop` draws it.

  Args:
    uniform_4: four numbers in [0, 1): area, shape, and place from the top and from the left.
    height: of the image.
    width: of the image.
    min_area: of the part, as a share of the image's; it is uniform from there to all of it.
    max_aspect: of width to height and of height to width, as far as the area allows.
  """
  area = min_area + (1 - min_area) * uniform_4[0]
  whole, most = math.log(width / height), math.log(max_aspect)
  lowest, highest = whole + math.log(area), whole - math.log(area)
  tallest, widest = (min(max(shape, lowest), highest) for shape in (-most, most))
  aspect = math.exp(tallest + (widest - tallest) * uniform_4[1])
  high = min(math.sqrt(area * height * width / aspect), height)  # which rounding may overstep
  wide = min(math.sqrt(area * height * width * aspect), width)
  top, left = uniform_4[2] * (height - high), uniform_4[3] * (width - wide)
  return left, top, left + wide, top + high


def decode_part(
  encoded: bytes,
  name: object,
  channels: int,
  choose: Callable[[int, int], Box],
  size: tuple[int, int],
) -> np.ndarray:
  """Decodes a file and scales a part of it: `image_HWC`, uint8.

  A JPEG is decoded at a half, a quarter or an eighth of its size, by fewer terms of its cosine
  transform, where its part is that much larger than `size`.

  Args:
    encoded: the file's bytes.
    name: of the file.
    channels: 1 or 3.
    choose: `(height, width) -> box` of the upright image.
    size: (height, width) wanted.

  Raises:
    BadImage: as `decode`.
  """
  with refused(encoded, name):
    opened = open_header(encoded)
    if not is_ordinary(opened, encoded, channels):
      image_HWC = np.asarray(convert(ImageOps.exif_transpose(opened), channels))
      return scale_part(image_HWC, choose(*image_HWC.shape[:2]), size)
    left, top, right, bottom = choose(opened.height, opened.width)
    ratio = min((bottom - top) / size[0], (right - left) / size[1])
    shrink = max([n for n in (8, 4, 2) if n <= ratio], default=1)
    cv2 = opencv()
    flag = getattr(cv2, f'IMREAD_REDUCED_COLOR_{shrink}') if shrink > 1 else cv2.IMREAD_COLOR
    image_HWC = cv2.imdecode(np.frombuffer(encoded, np.uint8), flag)
    if image_HWC is None:
      raise ValueError('its data is damaged')
    down, across = image_HWC.shape[0] / opened.height, image_HWC.shape[1] / opened.width
    box = left * across, top * down, right * across, bottom * down
    return cv2.cvtColor(scale_part(image_HWC, box, size), cv2.COLOR_BGR2RGB)


def is_ordinary(opened: Image.Image, encoded: bytes, channels: int) -> bool:
  """Whether it is a whole, upright RGB JPEG; OpenCV would fill what is missing with grey."""
  return (
    opened.format == 'JPEG'
    and opened.mode == 'RGB'
    and channels == 3
    and encoded.endswith(b'\xff\xd9')
    and opened.getexif().get(ExifTags.Base.Orientation, 1) == 1
  )


def scale_part(image_HWC: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
  """Scales a part of an array, its edges rounded to whole pixels: `image_HWC`, uint8.

  It is interpolated linearly. An axis that becomes shorter is blurred first, so that the whole has
  the variance of Pillow's bilinear filter, a triangle as wide as two new pixels. Where one falls
  below a half, pixels are means over their areas instead.
  """
  cv2 = opencv()
  left, top = (min(round(edge), n - 1) for edge, n in zip(box[:2], image_HWC.shape[1::-1]))
  right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
  part_HWC = image_HWC[top:bottom, left:right]
  down, across = (max(n / wanted, 1) for n, wanted in zip(part_HWC.shape, size))
  if max(down, across) > 2:
    smaller = min(right - left, size[1]), min(bottom - top, size[0])
    part_HWC = cv2.resize(part_HWC, smaller, interpolation=cv2.INTER_AREA)
  elif max(down, across) > 1:
    # A triangle of half-width f has the variance f^2 / 6, linear interpolation that of f = 1, and
    # weights a, 1 - 2a, a have 2a.
    sides = ((f * f - 1) / 12 for f in (across, down))
    weights = (np.array([a, 1 - 2 * a, a], np.float32) for a in sides)
    part_HWC = cv2.sepFilter2D(part_HWC, -1, *weights, borderType=cv2.BORDER_REPLICATE)
  part_HWC = cv2.resize(part_HWC, size[::-1], interpolation=cv2.INTER_LINEAR)
  return part_HWC[..., None] if part_HWC.ndim == 2 else part_HWC


@functools.cache
def opencv():
  """OpenCV, imported where it is needed, and without threads of its own."""
  import cv2

  cv2.setNumThreads(0)
  return cv2


FILTERS = ('nearest', 'box', 'bilinear', 'hamming', 'bicubic', 'lanczos')  # of every Pillow
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in FILTERS}


def find_images(paths: list[str]) -> list[pathlib.Path]:
  """The files named, and the images in the folders and patterns (`photos/*.jpg`) named, sorted.

  Raises:
    ValueError: no path, or a folder or a pattern without images.
  """
  if not paths:
    raise ValueError('No images are named: give --images=file.png,folder/, comma-separated.')
  found = []
  for path in map(local, paths):
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


def save_png(image_HWC: np.ndarray, path: pathlib.Path) -> None:
  """Writes a uint8 array as PNG."""
  pixels = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
  with storage.writing(path):
    Image.fromarray(pixels).save(path)
