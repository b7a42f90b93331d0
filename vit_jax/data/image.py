"""Decodes image files to uint8 arrays on the host; `vit_jax.augment` augments them on the device.

Decisions:
  * Pillow decodes whole images. OpenCV decodes random crops of ordinary RGB JPEGs, and scales all
    random crops. OpenCV is faster (results/input.json), and crops are made again in every epoch.
    Pillow reads the header of all files, so crops do not change which files are accepted.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import io
import math
import pathlib
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vit_jax import storage

EXTENSIONS = ('.jpg', '.jpeg', '.jfif', '.png', '.webp', '.bmp')
# Accepted formats, for any extension. To open e.g. EPS files, Pillow would run other programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')
MARKS = {  # {(offset, bytes there): rejected format}; such files often have a wrong extension
  (0, b'GIF8'): 'GIF', (0, b'II*\0'): 'TIFF', (0, b'MM\0*'): 'TIFF', (4, b'ftyphei'): 'HEIC',
  (4, b'ftypmif1'): 'HEIC', (4, b'ftypavif'): 'AVIF',
}  # fmt: skip
Turn = Image.Transpose
TURNS = {  # {EXIF orientation: how the stored image becomes upright}
  2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
  6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}  # fmt: skip
# Pillow refuses very large images. Its warning for images above half of this limit is hidden.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning, append=True)

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Fit = Callable[[Image.Image, tuple[int, int]], np.ndarray]  # (image, (height, width)) -> image_HWC


class BadImage(ValueError):
  """Raised for a file that cannot be decoded; the message gives its name and the reason."""


def has_image_name(name: str) -> bool:
  """Returns whether a file name has the extension of an image, and does not start with a dot."""
  return name.lower().endswith(EXTENSIONS) and not name.startswith('.')


def only_images(names: Iterable[str], passed_over: collections.Counter) -> Iterator[str]:
  """Yields the names of images, and counts other visible files by extension in `passed_over`."""
  for name in names:
    if has_image_name(name):
      yield name
    elif not name.startswith('.'):
      passed_over[pathlib.PurePath(name).suffix.lower() or 'without an extension'] += 1


def decode_image(
  encoded: bytes, name: object, channels: int = 3, max_pixels: int | None = None
) -> Image.Image:
  """Decodes a file to an upright 8-bit image with 1 (grey) or 3 (RGB) channels.

  EXIF rotation is applied, transparent pixels get a white background, and 16-bit grey is scaled.

  Raises:
    BadImage: the file `name` is not an image, is incomplete, has floating-point pixels, or has more
      pixels than `max_pixels` (if given) or than Pillow's limit against decompression bombs.
  """
  with refused(encoded, name):
    opened = open_header(encoded)
    if max_pixels and opened.width * opened.height > max_pixels:
      raise ValueError(f'{opened.width}x{opened.height} pixels, at most {max_pixels:,} are allowed')
    return convert(turned(opened), channels)


def open_header(file: bytes | pathlib.Path) -> Image.Image:
  """Opens an image, given its path or content; this reads only the header, and no pixels."""
  return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)


def orientation_of(opened: Image.Image) -> int:
  """Returns the EXIF orientation, 1 to 8; 1 (upright) if the EXIF data is missing or damaged."""
  if opened.format == 'PNG' and 'exif' not in opened.info:
    opened.load()  # the EXIF data can follow the pixels; damaged pixels must raise an error
  try:
    orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in TURNS else 1
  except MemoryError:
    raise
  except Exception:  # Pillow raises many kinds of errors, although the pixels can be intact
    return 1


def turned(opened: Image.Image) -> Image.Image:
  """Decodes an image, and turns it as its EXIF orientation says."""
  opened.load()
  turn = TURNS.get(orientation_of(opened))
  return opened if turn is None else opened.transpose(turn)


def upright_size(encoded: bytes, name: object) -> tuple[int, int]:
  """Returns an image's (height, width) after EXIF rotation; decodes pixels only in some PNGs.

  Raises:
    BadImage: the header cannot be read, or the pixels of a PNG file cannot be decoded.
  """
  with refused(encoded, name):
    opened = open_header(encoded)
    return opened.size if orientation_of(opened) >= 5 else opened.size[::-1]  # 5 to 8 swap sides


@contextlib.contextmanager
def refused(encoded: bytes, name: object) -> Iterator[None]:
  """Context manager that converts every error except lack of memory into a `BadImage`."""
  try:
    yield
  except Exception as error:  # Pillow's decoders raise many kinds of errors
    if isinstance(error, MemoryError) or getattr(error, 'code', None) == -4:  # of OpenCV
      raise MemoryError(str(error)) from error  # the file can be intact
    reason = 'empty file' if not encoded else str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError) and encoded:
      reason = format_of(encoded)  # Pillow's own message contains a memory address
    if isinstance(error, Image.DecompressionBombError):
      reason = f'more than {int(2 * Image.MAX_IMAGE_PIXELS):,} pixels: make the image smaller'
    raise BadImage(f'{name}: not a readable image ({reason}).') from error


def format_of(encoded: bytes) -> str:
  """Returns words for an error message: the format of a file that Pillow does not accept."""
  for (start, mark), name in MARKS.items():
    if encoded[start:].startswith(mark):
      return f'a {name} file: convert it to JPEG or PNG'
  return 'unknown image format'


def convert(image: Image.Image, channels: int) -> Image.Image:
  """Converts a Pillow image to 8-bit grey or RGB; floating-point pixels raise ValueError."""
  if image.mode == 'F':
    raise ValueError('the range of its floating-point pixels is unknown')
  if image.mode.startswith('I'):  # 16-bit grey
    level = np.asarray(image).astype(np.float32)
    level[level == image.info.get('transparency', -1)] = 65535  # the new image has no transparency
    image = Image.fromarray(np.clip(np.round(level / 257), 0, 255).astype(np.uint8))
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
  """Returns an image cropped and scaled to `size`: uint8 `[H, W, C]`.

  Args:
    image: grey or RGB image.
    size: (height, width) of the result.
    interpolation: name from `INTERPOLATIONS`; all but `nearest` average pixels to shrink an image.
    crop: fraction of height and width that a central crop keeps before scaling.
    stretch: True: scale height and width independently; False: crop to the aspect ratio of `size`.
  """
  method, (height, width) = INTERPOLATIONS[interpolation], size
  if stretch:
    left, top = (n * (1 - crop) / 2 for n in image.size)
    box = left, top, image.width - left, image.height - top
    image = image.resize((width, height), method, box)
  else:
    image = ImageOps.fit(image, (width, height), method, bleed=(1 - crop) / 2)
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array


def refit(image_HWC: np.ndarray, size: tuple[int, int] | None, fit: Fit) -> np.ndarray:
  """Scales a uint8 array `[H, W, C]` with `fit`, which gets the array as a Pillow image."""
  pixels = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
  return fit(Image.fromarray(pixels), size)


def random_part(
  uniform_4: Sequence[float], height: int, width: int, min_area: float, max_aspect: float
) -> Box:
  """Returns the box of a random crop, with the distribution of `augment.crops.resized_crop`.

  Args:
    uniform_4: four random numbers in [0, 1) for area, aspect ratio, top edge and left edge.
    height, width: size of the image, in pixels.
    min_area: smallest area, as a fraction of the image. The area is uniform in [`min_area`, 1).
    max_aspect: largest ratio of longer to shorter side; exceeded only if no such box fits.
  """
  area = min_area + (1 - min_area) * uniform_4[0]
  whole, most = math.log(width / height), math.log(max_aspect)
  lowest, highest = whole + math.log(area), whole - math.log(area)
  tallest, widest = (min(max(shape, lowest), highest) for shape in (-most, most))
  aspect = math.exp(tallest + (widest - tallest) * uniform_4[1])
  high = min(math.sqrt(area * height * width / aspect), height)  # rounding may exceed the height
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
  """Decodes an image file and scales a part of the image to `size`: uint8 `[H, W, C]`.

  To be faster, ordinary JPEGs (`is_ordinary`) are decoded at 1/n of their height and width. Here, n
  is the largest of 1, 2, 4 and 8 for which the decoded part is at least as large as `size`.

  Args:
    encoded: the bytes of the file.
    name: name of the file, for error messages.
    channels: 1 or 3.
    choose: maps the (height, width) of the upright image to the box of the part to return.
    size: (height, width) of the result.

  Raises:
    BadImage: the file cannot be decoded, for one of the reasons in `decode_image`.
  """
  with refused(encoded, name):
    opened = open_header(encoded)
    if not is_ordinary(opened, encoded, channels):
      image_HWC = np.asarray(convert(turned(opened), channels))
      return scale_part(image_HWC, choose(*image_HWC.shape[:2]), size)
    left, top, right, bottom = choose(opened.height, opened.width)
    ratio = min((bottom - top) / size[0], (right - left) / size[1])
    shrink = max([n for n in (8, 4, 2) if n <= ratio], default=1)
    cv2 = opencv()
    flag = getattr(cv2, f'IMREAD_REDUCED_COLOR_{shrink}') if shrink > 1 else cv2.IMREAD_COLOR
    flag |= cv2.IMREAD_IGNORE_ORIENTATION  # OpenCV reads some damaged EXIF data
    image_HWC = cv2.imdecode(np.frombuffer(encoded, np.uint8), flag)
    if image_HWC is None:
      raise ValueError('its data is damaged')
    down, across = image_HWC.shape[0] / opened.height, image_HWC.shape[1] / opened.width
    box = left * across, top * down, right * across, bottom * down
    return cv2.cvtColor(scale_part(image_HWC, box, size), cv2.COLOR_BGR2RGB)


def is_ordinary(opened: Image.Image, encoded: bytes, channels: int) -> bool:
  """Returns whether a file is a complete, upright RGB JPEG, and `channels` is 3.

  Only such files are decoded with OpenCV, because it fills missing parts of a file with grey.
  """
  rgb = opened.format == 'JPEG' and opened.mode == 'RGB' and channels == 3
  return rgb and encoded.endswith(b'\xff\xd9') and orientation_of(opened) == 1


def scale_part(image_HWC: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
  """Scales the part `box` of a uint8 image to `size` (height, width): uint8 `[H, W, C]`.

  The edges of the part are rounded to whole pixels. If height or width shrinks to less than half,
  each new pixel is the mean of the old pixels in its area. If both shrink less, the part is first
  blurred, then interpolated linearly. Both steps together have the variance of Pillow's bilinear
  filter, a triangle as wide as two new pixels.
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
    # A triangle of half-width f has the variance f^2 / 6. Linear interpolation is such a triangle
    # with f = 1, and the weights (a, 1 - 2a, a) have the variance 2a.
    sides = ((f * f - 1) / 12 for f in (across, down))
    weights = (np.array([a, 1 - 2 * a, a], np.float32) for a in sides)
    part_HWC = cv2.sepFilter2D(part_HWC, -1, *weights, borderType=cv2.BORDER_REPLICATE)
  part_HWC = cv2.resize(part_HWC, size[::-1], interpolation=cv2.INTER_LINEAR)
  return part_HWC[..., None] if part_HWC.ndim == 2 else part_HWC


@functools.cache
def opencv():
  """Imports OpenCV on first use, disables OpenCV's own threads, and returns the module `cv2`."""
  import cv2

  cv2.setNumThreads(0)
  return cv2


FILTERS = ('nearest', 'box', 'bilinear', 'hamming', 'bicubic', 'lanczos')  # in all Pillow versions
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in FILTERS}


def save_png(image_HWC: np.ndarray, path: pathlib.Path) -> None:
  """Writes a uint8 array, `[H, W, 1]` or `[H, W, 3]`, to a PNG file."""
  pixels = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
  with storage.replacing(path) as partial:
    Image.fromarray(pixels).save(partial, format='PNG')
