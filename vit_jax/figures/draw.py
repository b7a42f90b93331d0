"""Draws figures from arrays, with matplotlib only.

Each function returns a `Figure` that is 8 inches wide, to be shown 800 pixels wide.

Decisions:
  * Figures are created without pyplot, so no display is needed and no figure has to be closed.
  * Categories have colours that colour-blind readers can tell apart (Okabe and Ito's palette).
    As in the paper, maps use viridis, whose colours run from dark to light.
  * Large grids of maps are drawn as one image with gaps, because hundreds of axes would be slow.
  * A character that matplotlib's own font lacks is drawn with an installed font of `FALLBACKS`.
    Without such a font, a box is drawn instead, and matplotlib's warning is hidden.
"""

from collections.abc import Sequence

from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from vit_jax.figures import canvas

SPLITS = {'train': canvas.BLUE, 'val': canvas.GREEN, 'test': canvas.ORANGE}

PATCHES = 14  # maximum number of patches in the bottom row of `draw_patches`


@canvas.styled
def draw_curves(lines: list[dict]) -> Figure:
  """Draws the curves of loss and accuracy over the training steps, for each split.

  Args:
    lines: lines of `metrics.jsonl` as dicts. In a run without labels (`objective=masked`), lines
      have no accuracy, and their loss is the error of the predicted patches.
  """
  figure = Figure((canvas.WIDTH, 3.0), layout='constrained')
  labelled = any('accuracy' in line for line in lines)
  panels = {'loss': 'loss (nats)', 'accuracy': 'accuracy'} if labelled else {'loss': 'loss'}
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (name, label) in zip(axes, panels.items()):
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
  if labelled:
    axes[1].yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  return figure


@canvas.styled
def draw_mistakes(
  image_NHWC: np.ndarray,
  truths: Sequence[str],
  predictions: Sequence[str],
  confidences: Sequence[float],
) -> Figure:
  """Draws wrongly classified images with true class, predicted class and confidence.

  Args:
    image_NHWC: uint8 images.
    truths: name of the true class of each image.
    predictions: name of the predicted class of each image.
    confidences: probability of the predicted class of each image, 0 to 1.
  """
  columns = 5
  rows = -(-len(image_NHWC) // columns)
  height, width = image_NHWC.shape[1:3]
  figure = Figure((canvas.WIDTH, (1.5 * height / width + 0.5) * rows), layout='constrained')
  figure.get_layout_engine().set(h_pad=0.1)  # inches; the upper texts would be cut otherwise
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes:
    axis.set_axis_off()
  for axis, image, truth, taken, share in zip(axes, image_NHWC, truths, predictions, confidences):
    canvas.show_image(axis, image)
    axis.set_title(f'true: {canvas.short(truth)}', size=8, pad=15)
    text = f'model: {canvas.short(taken, 11)}, {100 * share:.1f}%'
    above = dict(xycoords='axes fraction', xytext=(0, 4), textcoords='offset points', ha='center')
    axis.annotate(text, (0.5, 1), size=8, color=canvas.ORANGE, **above)
  return figure


@canvas.styled
def draw_patches(image_HWC: np.ndarray, patch_hwpqC: np.ndarray) -> Figure:
  """Draws an image three times: with patch borders, as separate patches, and as a sequence.

  Args:
    image_HWC: uint8 image.
    patch_hwpqC: patches of the image, as `maps.patches` returns them.
  """
  h, w, p, q, _ = patch_hwpqC.shape
  height, width, _ = image_HWC.shape
  figure = Figure(
    (canvas.WIDTH, min(max(4.0 * height / width, 1.8), 5.0) + 1.1), layout='constrained'
  )
  spec = figure.add_gridspec(2, 2, height_ratios=(5, 1))
  whole, apart, row = (figure.add_subplot(spec[where]) for where in ((0, 0), (0, 1), (1, slice(2))))
  canvas.show_image(whole, image_HWC, extent=(0, width, height, 0))
  lines = dict(color=canvas.ORANGE, linewidth=0.8)
  whole.hlines(np.arange(1, h) * p, 0, width, **lines)
  whole.vlines(np.arange(1, w) * q, 0, height, **lines)
  whole.set(xlabel='pixels across', ylabel='pixels down', title=f'image, {height} x {width} pixels')
  for axis in (whole.xaxis, whole.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  tile_hwpqC = canvas.enlarge(patch_hwpqC)
  tall, wide = tile_hwpqC.shape[2:4]
  gap = min(tall, wide) // 6
  canvas.show_image(apart, canvas.mosaic(tile_hwpqC, gap))
  apart.set_title(f'{h} x {w} patches of {p} x {q} pixels')
  apart.set_axis_off()

  count = h * w
  shown = list(range(count)) if count <= PATCHES else [*range(PATCHES - 2), None, count - 1]
  tile_NpqC = tile_hwpqC.reshape(count, *tile_hwpqC.shape[2:])
  blank = np.full_like(tile_NpqC[0], canvas.GROUND)
  strip = np.stack([blank if i is None else tile_NpqC[i] for i in shown])[None]
  canvas.show_image(row, canvas.mosaic(strip, gap))
  names = ['...' if i is None else i + 1 for i in shown]
  row.set_xticks(np.arange(len(shown)) * (wide + gap) + (wide - 1) / 2, names, size=8)
  row.set_yticks([])
  row.tick_params(length=0)
  row.spines[:].set_visible(False)
  row.set_xlabel(f'position in the sequence of {count} patch tokens')
  return figure


@canvas.styled
def draw_filters(filter_FpqC: np.ndarray, share_F: np.ndarray) -> Figure:
  """Draws the principal components of the patch embedding and their shares of the variance.

  Each component is divided by the largest magnitude of its entries. Mid-grey is zero.

  Args:
    filter_FpqC: the components, as `maps.filters` returns them.
    share_F: share of the variance that each component explains; written above the component.
  """
  columns = min(7, len(filter_FpqC))
  rows = -(-len(filter_FpqC) // columns)
  tile = min(canvas.WIDTH / columns, 1.4)
  figure = Figure((canvas.WIDTH, rows * (tile + 0.1) + 0.1), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes[len(filter_FpqC) :]:
    axis.set_visible(False)
  for axis, tile_pqC, share in zip(axes, filter_FpqC, share_F):
    largest = max(np.abs(tile_pqC).max(), np.finfo(np.float32).tiny)
    canvas.show_image(axis, np.round(127.5 + 127.5 * tile_pqC / largest).astype(np.uint8))
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    axis.set_title(f'{100 * share:.1f}%', size=8, pad=2)
  return figure


@canvas.styled
def draw_position_similarity(similarity_hwhw: np.ndarray) -> Figure:
  """Draws a map for each patch: cosine similarities of its position embedding to all embeddings.

  If the grid of patches is large, only the maps of evenly spaced patches are drawn.

  Args:
    similarity_hwhw: cosine similarity of every two patches, from `maps.position_similarity`.
  """
  h, w = similarity_hwhw.shape[:2]
  row_R, column_C = (canvas.evenly(n, canvas.TILES) for n in (h, w))
  tile_RChw = similarity_hwhw[row_R][:, column_C]
  size = 5.4
  figure = Figure((canvas.WIDTH, min(size * h / w, 7.0) + 0.5), layout='constrained')
  axis = figure.subplots()
  shades = canvas.show_mosaic(axis, tile_RChw, row_R + 1, column_C + 1, vmin=-1, vmax=1)
  axis.set(xlabel='column of the patch', ylabel='row of the patch')
  canvas.add_colours(figure, shades, axis, 'cosine similarity', ticks=(-1, -0.5, 0, 0.5, 1))
  return figure


@canvas.styled
def draw_attention_distance(distance_DK: np.ndarray, even: float) -> Figure:
  """Draws the mean attention distance of each head in each block, as dots over the blocks.

  Args:
    distance_DK: mean attention distance in pixels, for D blocks and K heads.
    even: distance in pixels of a head that attends equally to all patches; drawn as a line.
  """
  figure = Figure((canvas.WIDTH, 3.4), layout='constrained')
  axis = figure.subplots()
  layer_D = np.arange(1, len(distance_DK) + 1)
  depth, heads = distance_DK.shape
  axis.axhline(even, color=canvas.GREY, linewidth=1, linestyle=(0, (4, 3)), label='even attention')
  axis.plot(layer_D, distance_DK.mean(axis=1), color=canvas.ORANGE, label='mean of the heads')
  dots = dict(s=26, color=canvas.BLUE, alpha=0.7, linewidth=0, zorder=3)
  axis.scatter(np.repeat(layer_D, heads), distance_DK.ravel(), label='a head', **dots)
  axis.set(xlabel='network depth (block)', ylabel='mean attention distance (pixels)')
  axis.set_xlim(0.5, depth + 0.5)
  axis.set_ylim(0, max(even, distance_DK.max()) * 1.12)
  axis.set_xticks(canvas.evenly(depth, 16) + 1)
  axis.grid(axis='y')
  axis.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0))
  return figure


@canvas.styled
def draw_rollout(image_BHWC: np.ndarray, map_Bhw: np.ndarray) -> Figure:
  """Draws three rows: images, images darkened where attention rollout is low, and rollout maps.

  Args:
    image_BHWC: uint8 images.
    map_Bhw: attention rollout of each image, as `maps.rollout` returns it.
  """
  count = len(image_BHWC)
  _, height, width, _ = image_BHWC.shape
  even_Bhw = map_Bhw / np.maximum(map_Bhw.mean(axis=(1, 2), keepdims=True), 1e-30)
  columns = max(count, 4)
  tile = (canvas.WIDTH - 1.3) / columns
  figure = Figure((canvas.WIDTH, 3 * tile * height / width + 0.5), layout='constrained')
  axes = figure.subplots(3, columns, squeeze=False)
  for axis in axes.ravel():
    canvas.bare(axis)
  for column, image, even_hw in zip(axes.T, image_BHWC, even_Bhw):
    canvas.show_image(column[0], image)
    lit = canvas.resize_map(even_hw / max(even_hw.max(), 1e-30), (height, width))[..., None]
    canvas.show_image(column[1], np.round(image * lit).astype(np.uint8))
    shades = column[2].imshow(
      even_hw, vmin=0, vmax=even_Bhw.max(), extent=(0, width, height, 0), aspect='equal'
    )
  for axis in axes[:, count:].ravel():
    axis.set_visible(False)
  for axis, label in zip(axes[:, 0], ('image', 'lit by rollout', 'rollout')):
    axis.set_ylabel(label)
  canvas.add_colours(figure, shades, axes[2], 'even = 1')
  return figure


@canvas.styled
def draw_components(image_BHWC: np.ndarray, colour_Bhw3: np.ndarray) -> Figure:
  """Draws a row of images, and below each image the colours of its patches.

  Args:
    image_BHWC: uint8 images.
    colour_Bhw3: colour of each patch, as `component_colours` returns it.
  """
  _, height, width, _ = image_BHWC.shape
  columns = max(len(image_BHWC), 4)
  tile = canvas.WIDTH / columns
  figure = Figure((canvas.WIDTH, 2 * tile * height / width + 0.1), layout='constrained')
  axes = figure.subplots(2, columns, squeeze=False)
  for axis in axes.ravel():
    canvas.bare(axis)
  for column, image, colour_hw3 in zip(axes.T, image_BHWC, colour_Bhw3):
    canvas.show_image(column[0], image)
    column[1].imshow(colour_hw3, extent=(0, width, height, 0), aspect='equal')
  for axis in axes[:, len(image_BHWC) :].ravel():
    axis.set_visible(False)
  for axis, label in zip(axes[:, 0], ('image', 'components')):
    axis.set_ylabel(label)
  return figure


@canvas.styled
def draw_head_attention(image_HWC: np.ndarray, map_RKhw: np.ndarray, rows: Sequence[str]) -> Figure:
  """Draws an attention map for each head of each block, for one image.

  Each map is divided by its largest value. If there are more than `canvas.TILES` blocks or heads,
  only evenly spaced blocks or heads are drawn.

  Args:
    image_HWC: uint8 image to draw next to the maps.
    map_RKhw: one map for each row and each of K heads. A row is a block, or the pool.
    rows: names of the R rows.
  """
  h, w = map_RKhw.shape[2:]
  row_R, head_K = (canvas.evenly(n, canvas.TILES) for n in map_RKhw.shape[:2])
  tile_RKhw = map_RKhw[row_R][:, head_K]
  tile_RKhw = tile_RKhw / np.maximum(tile_RKhw.max(axis=(2, 3), keepdims=True), 1e-30)
  maps_width = 4.7
  tall = maps_width * len(row_R) * h / (len(head_K) * w)
  figure = Figure((canvas.WIDTH, min(max(tall, 2.0), 8.0) + 0.6), layout='constrained')
  left, axis = figure.subplots(1, 2, width_ratios=(1, 3.4))
  canvas.show_image(left, image_HWC)
  left.set_axis_off()
  left.set_title('image')
  names = [rows[i] for i in row_R]
  shades = canvas.show_mosaic(axis, tile_RKhw, names, head_K + 1, vmin=0, vmax=1)
  axis.set(xlabel='head')
  canvas.add_colours(figure, shades, axis, "share of a map's largest value")
  return figure
