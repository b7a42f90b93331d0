"""Figures from arrays, with matplotlib and nothing else of the project.

Each function gives a `Figure` 8 inches wide, to be read at 800 pixels: an inch is 100 of them.

Decisions:
  * Figures belong to no pyplot: nothing to close, and no display is looked for.
  * Colours tell classes of things apart for colour-blind eyes too (Okabe and Ito's); shades run
    from dark to light in one direction (viridis), as in the paper.
  * What is many is shown as one image with gaps, not as hundreds of axes.
  * Letters that matplotlib's own font lacks are drawn in one of `FALLBACKS` that is installed;
    where none is, as boxes, and matplotlib's warning about each is not passed on.
"""

from collections.abc import Sequence
import pathlib
import warnings

import matplotlib
from matplotlib import font_manager, ticker
from matplotlib.figure import Figure
import numpy as np

from vit_jax import output

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#666666'
GROUND = 228  # grey between patches, where white would be taken for theirs
SPLITS = {'train': BLUE, 'val': GREEN, 'test': ORANGE}
FALLBACKS = (  # fonts of many scripts
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
NUMBERED, LABELLED = 20, 40  # classes: of more, cells have no numbers, axes no names
LOWEST = 20  # classes named where there are too many for all
TILES = 16  # along one side of a mosaic
PATCHES = 14  # shown in a row

styled = matplotlib.rc_context(STYLE)


@styled
def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a PNG 1200 pixels wide, without date or version: the same figure, the same bytes."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing from font')
    with output.replacing(path) as partial:
      figure.savefig(partial, dpi=150, format='png', metadata={'Software': None})


@styled
def curves(lines: list[dict]) -> Figure:
  """Loss and accuracy of every split over the steps, from the lines of `metrics.jsonl`."""
  figure = Figure((WIDTH, 3.0), layout='constrained')
  axes = figure.subplots(1, 2)
  for axis, name, label in zip(axes, ('loss', 'accuracy'), ('loss (nats)', 'accuracy')):
    for split, colour in SPLITS.items():
      mine = [line for line in lines if line.get('split') == split and name in line]
      points = [(line['step'], line[name]) for line in mine]
      if points:
        marker = '.' if len(points) < 30 else None
        axis.plot(*zip(*points), label=split, color=colour, marker=marker)
    axis.set(xlabel='training step', ylabel=label)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:,.0f}'))
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axis.grid()
    axis.set_ylim(bottom=0)
  axes[0].legend()
  axes[1].yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  return figure


@styled
def confusion(count_LL: np.ndarray, accuracy_L: np.ndarray, class_names: Sequence[str]) -> Figure:
  """Which class (row) is taken for which, and how much of each is right."""
  classes = len(class_names)
  total_L1 = count_LL.sum(axis=1, keepdims=True)
  share_LL = np.where(total_L1 > 0, count_LL / np.maximum(total_L1, 1), np.nan)
  figure = Figure((WIDTH, min(max(0.42 * classes, 1.5), 4.2) + 1.2), layout='constrained')
  matrix, bars = figure.subplots(1, 2, width_ratios=(2.4, 1))
  norm = matplotlib.colors.PowerNorm(1 if classes <= NUMBERED else 0.5, 0, 1)
  shades = matrix.imshow(share_LL, cmap='Blues', norm=norm, aspect='auto')
  number = '' if classes <= LABELLED else ' (number)'
  matrix.set(xlabel=f'predicted class{number}', ylabel=f'true class{number}')
  matrix.tick_params(length=0)
  if classes <= LABELLED:
    names = [short(name) for name in class_names]
    matrix.set_yticks(range(classes), names, fontsize=small(classes))
    turn = dict(rotation=45, ha='right', rotation_mode='anchor')
    turn = turn if max(map(len, names)) > 2 else {}
    matrix.set_xticks(range(classes), names, fontsize=small(classes), **turn)
  if classes <= NUMBERED:
    matrix.set_title('percent of the true class')
    matrix.spines[:].set_visible(False)
    for (i, j), share in np.ndenumerate(share_LL):
      if share >= 0.005:
        colour = 'white' if share > 0.55 else 'black'
        matrix.text(j, i, f'{100 * share:.0f}', ha='center', va='center', color=colour, size=8)
  else:
    matrix.spines[:].set_visible(True)
    bar = add_colours(figure, shades, matrix, 'share of the true class', location='left')
    bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  class_bars(bars, accuracy_L, class_names)
  return figure


def class_bars(axis, accuracy_L: np.ndarray, class_names: Sequence[str]) -> None:
  """Accuracy of each class; of the lowest where there are too many to name."""
  order = np.arange(len(class_names))
  title = 'accuracy of each class'
  if len(order) > LABELLED:
    order = np.argsort(accuracy_L, kind='stable')[:LOWEST]  # NaN comes last
    title = f'the {LOWEST} lowest of {len(class_names):,} classes'
  names = [short(class_names[i]) for i in order]
  axis.barh(range(len(order)), np.nan_to_num(accuracy_L[order]), height=0.7, color=BLUE)
  axis.set_yticks(range(len(order)), names, fontsize=small(len(order)))
  axis.set(ylim=(len(order) - 0.5, -0.5), xlim=(0, 1), xlabel='accuracy', title=title)
  axis.tick_params(axis='y', length=0)
  axis.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  axis.xaxis.set_major_locator(ticker.MultipleLocator(0.5))
  axis.grid(axis='x')
  if len(order) > NUMBERED:
    return
  for i, value in enumerate(accuracy_L[order]):
    if np.isnan(value):
      axis.text(0.02, i, 'no example', va='center', size=8)
    elif value > 0.3:
      axis.text(value - 0.02, i, f'{100 * value:.1f}', va='center', ha='right', color='w', size=8)
    else:
      axis.text(value + 0.02, i, f'{100 * value:.1f}', va='center', size=8)


def small(labels: int) -> int:
  """The size of type, in points, in which so many labels fit side by side."""
  return 8 if labels <= NUMBERED else 6


@styled
def mistakes(
  image_NHWC: np.ndarray,
  truths: Sequence[str],
  predictions: Sequence[str],
  confidences: Sequence[float],
) -> Figure:
  """Images with what each is, what it was taken for, and how surely."""
  columns = 5
  rows = -(-len(image_NHWC) // columns)
  height, width = image_NHWC.shape[1:3]
  figure = Figure((WIDTH, (1.5 * height / width + 0.5) * rows), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes:
    axis.set_axis_off()
  for axis, image, truth, taken, share in zip(axes, image_NHWC, truths, predictions, confidences):
    show(axis, image)
    axis.set_title(f'true: {short(truth)}', size=8, pad=15)
    text = f'model: {short(taken, 11)}, {100 * share:.1f}%'
    above = dict(xycoords='axes fraction', xytext=(0, 4), textcoords='offset points', ha='center')
    axis.annotate(text, (0.5, 1), size=8, color=ORANGE, **above)
  return figure


@styled
def patches(image_HWC: np.ndarray, patch_hwpqC: np.ndarray) -> Figure:
  """An image with the borders of its patches, its patches apart, and the sequence they make."""
  h, w, p, q, _ = patch_hwpqC.shape
  height, width, _ = image_HWC.shape
  figure = Figure((WIDTH, min(max(4.0 * height / width, 1.8), 5.0) + 1.1), layout='constrained')
  spec = figure.add_gridspec(2, 2, height_ratios=(5, 1))
  whole, apart, row = (figure.add_subplot(spec[where]) for where in ((0, 0), (0, 1), (1, slice(2))))
  show(whole, image_HWC, extent=(0, width, height, 0))
  lines = dict(color=ORANGE, linewidth=0.8)
  whole.hlines(np.arange(1, h) * p, 0, width, **lines)
  whole.vlines(np.arange(1, w) * q, 0, height, **lines)
  whole.set(xlabel='pixels across', ylabel='pixels down', title=f'image, {height} x {width} pixels')
  for axis in (whole.xaxis, whole.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  tile_hwpqC = enlarge(patch_hwpqC)
  tall, wide = tile_hwpqC.shape[2:4]
  gap = min(tall, wide) // 6
  show(apart, mosaic(tile_hwpqC, gap))
  apart.set_title(f'{h} x {w} patches of {p} x {q} pixels')
  apart.set_axis_off()

  count = h * w
  shown = list(range(count)) if count <= PATCHES else [*range(PATCHES - 2), None, count - 1]
  tile_NpqC = tile_hwpqC.reshape(count, *tile_hwpqC.shape[2:])
  blank = np.full_like(tile_NpqC[0], GROUND)
  strip = np.stack([blank if i is None else tile_NpqC[i] for i in shown])[None]
  show(row, mosaic(strip, gap))
  names = ['...' if i is None else i + 1 for i in shown]
  row.set_xticks(np.arange(len(shown)) * (wide + gap) + (wide - 1) / 2, names, size=8)
  row.set_yticks([])
  row.tick_params(length=0)
  row.spines[:].set_visible(False)
  row.set_xlabel(f'place in the sequence of {count} tokens that they become')
  return figure


@styled
def filters(filter_FpqC: np.ndarray, share_F: np.ndarray) -> Figure:
  """Principal components of the patch embedding, each scaled by itself, zero at mid-grey."""
  columns = min(7, len(filter_FpqC))
  rows = -(-len(filter_FpqC) // columns)
  tile = min(WIDTH / columns, 1.4)
  figure = Figure((WIDTH, rows * (tile + 0.1) + 0.1), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes[len(filter_FpqC) :]:
    axis.set_visible(False)
  for axis, tile_pqC, share in zip(axes, filter_FpqC, share_F):
    largest = max(np.abs(tile_pqC).max(), np.finfo(np.float32).tiny)
    show(axis, np.round(127.5 + 127.5 * tile_pqC / largest).astype(np.uint8))
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    axis.set_title(f'{100 * share:.1f}%', size=8, pad=2)
  return figure


@styled
def position_similarity(similarity_hwhw: np.ndarray) -> Figure:
  """For each patch a map of how like its position embedding is to all others."""
  h, w = similarity_hwhw.shape[:2]
  row_R, column_C = (evenly(n, TILES) for n in (h, w))
  tile_RChw = similarity_hwhw[row_R][:, column_C]
  size = 5.4
  figure = Figure((WIDTH, min(size * h / w, 7.0) + 0.5), layout='constrained')
  axis = figure.subplots()
  shades = show_mosaic(axis, tile_RChw, row_R + 1, column_C + 1, vmin=-1, vmax=1)
  axis.set(xlabel='column of the patch', ylabel='row of the patch')
  add_colours(figure, shades, axis, 'cosine similarity', ticks=(-1, -0.5, 0, 0.5, 1))
  return figure


@styled
def attention_distance(distance_DK: np.ndarray, even: float) -> Figure:
  """Mean attention distance of each head over depth, in pixels.

  Args:
    distance_DK: a row a block.
    even: that of a head that attends everywhere alike.
  """
  figure = Figure((WIDTH, 3.4), layout='constrained')
  axis = figure.subplots()
  layer_D = np.arange(1, len(distance_DK) + 1)
  depth, heads = distance_DK.shape
  axis.axhline(even, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label='even attention')
  axis.plot(layer_D, distance_DK.mean(axis=1), color=ORANGE, label='mean of the heads')
  dots = dict(s=26, color=BLUE, alpha=0.7, linewidth=0, zorder=3)
  axis.scatter(np.repeat(layer_D, heads), distance_DK.ravel(), label='a head', **dots)
  axis.set(xlabel='network depth (block)', ylabel='mean attention distance (pixels)')
  axis.set_xlim(0.5, depth + 0.5)
  axis.set_ylim(0, max(even, distance_DK.max()) * 1.12)
  axis.set_xticks(evenly(depth, 16) + 1)
  axis.grid(axis='y')
  axis.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0))
  return figure


@styled
def rollout(image_BHWC: np.ndarray, map_Bhw: np.ndarray) -> Figure:
  """Images, where the output comes from, and the images lit by that."""
  count = len(image_BHWC)
  _, height, width, _ = image_BHWC.shape
  even_Bhw = map_Bhw / np.maximum(map_Bhw.mean(axis=(1, 2), keepdims=True), 1e-30)
  columns = max(count, 4)
  tile = (WIDTH - 1.3) / columns
  figure = Figure((WIDTH, 3 * tile * height / width + 0.5), layout='constrained')
  axes = figure.subplots(3, columns, squeeze=False)
  for axis in axes.ravel():
    bare(axis)
  for column, image, even_hw in zip(axes.T, image_BHWC, even_Bhw):
    show(column[0], image)
    lit = resize(even_hw / max(even_hw.max(), 1e-30), (height, width))[..., None]
    show(column[1], np.round(image * lit).astype(np.uint8))
    shades = column[2].imshow(
      even_hw, vmin=0, vmax=even_Bhw.max(), extent=(0, width, height, 0), aspect='equal'
    )
  for axis in axes[:, count:].ravel():
    axis.set_visible(False)
  for axis, label in zip(axes[:, 0], ('image', 'lit by rollout', 'rollout')):
    axis.set_ylabel(label)
  add_colours(figure, shades, axes[2], 'even = 1')
  return figure


@styled
def head_attention(image_HWC: np.ndarray, map_RKhw: np.ndarray, rows: Sequence[str]) -> Figure:
  """What each head of each block attends to over one image, every map scaled to its own largest.

  Args:
    image_HWC: beside the maps.
    map_RKhw: a row of heads for each of `rows`.
    rows: their names.
  """
  h, w = map_RKhw.shape[2:]
  row_R, head_K = (evenly(n, TILES) for n in map_RKhw.shape[:2])
  tile_RKhw = map_RKhw[row_R][:, head_K]
  tile_RKhw = tile_RKhw / np.maximum(tile_RKhw.max(axis=(2, 3), keepdims=True), 1e-30)
  maps_width = 4.7
  tall = maps_width * len(row_R) * h / (len(head_K) * w)
  figure = Figure((WIDTH, min(max(tall, 2.0), 8.0) + 0.6), layout='constrained')
  left, axis = figure.subplots(1, 2, width_ratios=(1, 3.4))
  show(left, image_HWC)
  left.set_axis_off()
  left.set_title('image')
  names = [rows[i] for i in row_R]
  shades = show_mosaic(axis, tile_RKhw, names, head_K + 1, vmin=0, vmax=1)
  axis.set(xlabel='head')
  add_colours(figure, shades, axis, "share of a map's largest value")
  return figure


def show(axis, image_HWC: np.ndarray, **arguments):
  """An image of 1 or 3 channels, uint8."""
  if image_HWC.shape[-1] == 1:
    arguments |= dict(cmap='gray', vmin=0, vmax=255)
    image_HWC = image_HWC[..., 0]
  return axis.imshow(image_HWC, **arguments)


def bare(axis) -> None:
  """Takes ticks and frame away; a label stays."""
  axis.set(xticks=[], yticks=[])
  axis.spines[:].set_visible(False)


def enlarge(tile_RCpq: np.ndarray) -> np.ndarray:
  """Each pixel of the tiles as several, so that a gap can be thinner than what was a pixel."""
  times = -(-16 // min(tile_RCpq.shape[2:4]))
  return tile_RCpq.repeat(times, axis=2).repeat(times, axis=3)


def mosaic(tile_RCpq: np.ndarray, gap: int) -> np.ndarray:
  """Tiles `[R, C, p, q, ...]` side by side in one image, `gap` pixels between them."""
  rows, columns, p, q, *channels = tile_RCpq.shape
  ground = GROUND if tile_RCpq.dtype == np.uint8 else np.nan  # NaN is drawn as nothing
  pad = [(0, 0), (0, 0), (0, gap), (0, gap)] + [(0, 0)] * len(channels)
  padded = np.pad(tile_RCpq, pad, constant_values=ground)
  image = np.moveaxis(padded, 2, 1).reshape(rows * (p + gap), columns * (q + gap), *channels)
  return image[:-gap, :-gap]


def show_mosaic(axis, tile_RChw: np.ndarray, rows: Sequence, columns: Sequence, **limits):
  """Maps side by side, their rows and columns named."""
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
  """The bar that says which shade is which value."""
  bar = figure.colorbar(shades, ax=axes, label=label, aspect=18, pad=0.02, **arguments)
  bar.outline.set_visible(False)
  return bar


def evenly(size: int, most: int) -> np.ndarray:
  """At most `most` of the indices below `size`, evenly apart, the first and the last included."""
  return np.unique(np.round(np.linspace(0, size - 1, min(size, most))).astype(int))


def resize(map_hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Linear interpolation between the centres of patches: `[H, W]`."""
  for axis, wanted in enumerate(size):
    given = map_hw.shape[axis]
    where = (np.arange(wanted) + 0.5) * given / wanted - 0.5
    between = lambda line, where=where, given=given: np.interp(where, np.arange(given), line)
    map_hw = np.apply_along_axis(between, axis, map_hw)
  return map_hw


def short(name: str, most: int = 16) -> str:
  """A class name, in a line that fits beside its tick; a dollar sign would begin a formula."""
  name = ' '.join(name.encode(errors='replace').decode().split())  # a folder's need not be UTF-8
  name = name if len(name) <= most else name[: most - 1] + '…'
  return name.replace('$', r'\$')
