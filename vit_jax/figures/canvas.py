"""The style of all figures, and drawing functions that several figures share."""

from collections.abc import Sequence
import pathlib
import warnings

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
import numpy as np

from vit_jax import storage
from vit_jax.names import encodable

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#666666'
GROUND = 228  # grey level between patches; white could be mistaken for a part of the image

FALLBACKS = (  # fonts for scripts that DejaVu Sans lacks
  'Noto Sans CJK JP', 'WenQuanYi Zen Hei', 'WenQuanYi Micro Hei', 'Droid Sans Fallback',
  'Arial Unicode MS', 'Microsoft YaHei', 'Malgun Gothic', 'Nirmala UI',
)  # fmt: skip
STYLE = {
  'font.family': ['DejaVu Sans', *(f for f in FALLBACKS if f in font_manager.get_font_names())],
  'font.size': 9.0,
  'axes.titlesize': 9.0,
  'axes.edgecolor': GREY,
  'axes.linewidth': 0.8,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'xtick.color': GREY,
  'ytick.color': GREY,
  'xtick.labelcolor': 'black',
  'ytick.labelcolor': 'black',
  'grid.alpha': 0.3,
  'legend.frameon': False,
  'image.interpolation': 'nearest',
  'image.cmap': 'viridis',
  'lines.linewidth': 1.5,
}
WIDTH = 8.0  # inches

TILES = 16  # maximum number of tiles along one side of a mosaic

styled = matplotlib.rc_context(STYLE)


@styled
def save_figure(figure: Figure, path: pathlib.Path) -> None:
  """Writes a figure as a PNG file, 1200 pixels wide.

  The file contains no date and no version of matplotlib, so equal figures give equal files.
  """
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing from font')
    with storage.replacing(path) as partial:
      figure.savefig(partial, dpi=150, format='png', metadata={'Software': None})


def show_image(axis, image_HWC: np.ndarray, **arguments):
  """Draws a uint8 image `[H, W, C]` with 1 or 3 channels on a matplotlib axis.

  `**arguments` are passed to `axis.imshow`, whose result is returned.
  """
  if image_HWC.shape[-1] == 1:
    arguments |= dict(cmap='gray', vmin=0, vmax=255)
    image_HWC = image_HWC[..., 0]
  return axis.imshow(image_HWC, **arguments)


def bare(axis) -> None:
  """Removes the ticks and the frame of a matplotlib axis, but keeps the axis labels."""
  axis.set(xticks=[], yticks=[])
  axis.spines[:].set_visible(False)


def enlarge(tile_RCpq: np.ndarray) -> np.ndarray:
  """Enlarges R x C tiles of p x q pixels, `[R, C, p, q, ...]`, by repeating every pixel.

  Each enlarged tile has at least 16 pixels per side. So `mosaic` can draw gaps that are thinner
  than a pixel of the original tiles.
  """
  times = -(-16 // min(tile_RCpq.shape[2:4]))
  return tile_RCpq.repeat(times, axis=2).repeat(times, axis=3)


def mosaic(tile_RCpq: np.ndarray, gap: int) -> np.ndarray:
  """Arranges tiles of p x q pixels, `[R, C, p, q, ...]`, in R rows and C columns of one image.

  Neighbouring tiles are separated by `gap` pixels.
  """
  rows, columns, p, q, *channels = tile_RCpq.shape
  ground = GROUND if tile_RCpq.dtype == np.uint8 else np.nan  # matplotlib does not draw NaN
  pad = [(0, 0), (0, 0), (0, gap), (0, gap)] + [(0, 0)] * len(channels)
  padded = np.pad(tile_RCpq, pad, constant_values=ground)
  image = np.moveaxis(padded, 2, 1).reshape(rows * (p + gap), columns * (q + gap), *channels)
  return image[:-gap, :-gap]


def show_mosaic(axis, tile_RChw: np.ndarray, rows: Sequence, columns: Sequence, **limits):
  """Draws a grid of maps, and the names of its rows and columns.

  Args:
    axis: matplotlib axis to draw on.
    tile_RChw: a map of h x w values for each of R rows and C columns.
    rows: names of the R rows.
    columns: names of the C columns.
    **limits: arguments of `axis.imshow`, e.g. `vmin` and `vmax`.

  Returns:
    The drawn image, for which `add_colours` can add a colour bar.
  """
  tile_RChw = enlarge(tile_RChw)
  h, w = tile_RChw.shape[2:]
  gap = min(h, w) // 8
  shades = axis.imshow(mosaic(tile_RChw, gap), **limits)
  axis.set_xticks(np.arange(len(columns)) * (w + gap) + (w - 1) / 2, columns)
  axis.set_yticks(np.arange(len(rows)) * (h + gap) + (h - 1) / 2, rows)
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)
  return shades


def add_colours(figure: Figure, shades, axes, label: str, **arguments):
  """Adds a colour bar to a figure, and returns the colour bar.

  Args:
    figure: the matplotlib figure.
    shades: the drawn image whose colours the bar explains.
    axes: the axis or axes next to which the bar is placed.
    label: text next to the bar.
    **arguments: further arguments of `figure.colorbar`.
  """
  bar = figure.colorbar(shades, ax=axes, label=label, aspect=18, pad=0.02, **arguments)
  bar.outline.set_visible(False)
  return bar


def evenly(size: int, most: int) -> np.ndarray:
  """Returns at most `most` evenly spaced indices from 0 to `size - 1`, including both ends."""
  return np.unique(np.round(np.linspace(0, size - 1, min(size, most))).astype(int))


def resize_map(map_hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes a map `[h, w]`, with one value for each of h x w patches, to an image of size (H, W).

  Values are interpolated linearly between the centres of the patches.
  """
  for axis, wanted in enumerate(size):
    given = map_hw.shape[axis]
    where = (np.arange(wanted) + 0.5) * given / wanted - 0.5
    between = lambda line, where=where, given=given: np.interp(where, np.arange(given), line)
    map_hw = np.apply_along_axis(between, axis, map_hw)
  return map_hw


def short(name: str, most: int = 16) -> str:
  """Returns a class name in a form that fits on an axis: one line of at most `most` characters.

  Dollar signs are escaped, because matplotlib would read them as the start of a formula.
  """
  name = ' '.join(encodable(name).split())
  name = name if len(name) <= most else name[: most - 1] + '…'
  return name.replace('$', r'\$')
