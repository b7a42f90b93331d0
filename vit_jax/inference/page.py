"""Builds the demo page, which shows a model's predicted classes and attention for an image.

The page opens with the first example image. A text below the results states the model's limits.
"""

from collections.abc import Mapping, Sequence
import functools
import pathlib
from typing import NamedTuple

import gradio as gr
import jax
import numpy as np

from vit_jax.data import BadImage, decode_image
from vit_jax.evaluation import given_labels
from vit_jax.experiment import Experiment
from vit_jax.figures import Missing, attention_summary, resize_map
from vit_jax.inference.about import escaped
from vit_jax.inference.gate import Choice, Page, refuse_addresses
from vit_jax.names import encodable

MAX_PIXELS = 50_000_000  # maximum number of pixels of an uploaded image
MAX_WAITING = 256  # maximum number of queued requests
KEEP = 3600  # seconds for which uploads stay on disk, and results of the model stay in memory
CLEAN = 300  # seconds between two deletions of old uploads
EXPIRED = 'expired'  # state of a session whose results were deleted, or that the server never had
QUIET = dict(api_visibility='private', show_progress='hidden')

TOPK = 5  # number of classes that the page shows
SHOWN = 448  # minimum length in pixels of the shorter side of a shown image
ROLLOUT, MEAN = 'all blocks (rollout)', 'mean of all heads'
DARK = 0.15  # pixels without attention are multiplied by this factor


class Seen(NamedTuple):
  """The outputs of a model for an image.

  Attributes:
    image_HWC: uint8 image at the size to which image files are resized.
    probability_L: probability of each class.
    rollout_hw: attention of all blocks combined, for h x w patches (`maps.rollout`); None if the
      kind of pooling gives no attention maps.
    heads_RKhw: attention map of each head (K) in each block (R), as in `maps.head_attention`. If
      the pool has a learned query (`map`), the last of the R rows is the attention of this query.
      None if the kind of pooling gives no attention maps.
  """

  image_HWC: np.ndarray
  probability_L: np.ndarray
  rollout_hw: np.ndarray | None
  heads_RKhw: np.ndarray | None


class Viewer:
  """A compiled model that computes class probabilities and attention maps for image files."""

  def __init__(self, exp: Experiment, params: dict):
    """Compiles the model of an experiment; `params` are its parameters."""
    self.exp = exp
    self._look = functools.partial(jax.jit(self.look), jax.device_put(params))
    blank_HWC = np.zeros((*exp.task.stored_size, exp.task.channels), np.uint8)
    seen = self.see(blank_HWC)  # the first call compiles
    self.rows, self.heads = (0, 0) if seen.heads_RKhw is None else seen.heads_RKhw.shape[:2]

  def look(self, params: dict, image_HWC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the probabilities `[L]` and the `attention_summary` of one uint8 image.

    If the kind of pooling gives no attention maps, the summary contains `(None,)` instead.
    """
    image_BHWC = self.exp.normalize(image_HWC[None])
    (probability_L,) = self.exp.probabilities(params, image_HWC[None])
    try:
      return probability_L, attention_summary(self.exp.model, params, image_BHWC)
    except Missing:
      return probability_L, {'rollout': (None,), 'heads': (None,)}

  def see(self, image_HWC: np.ndarray) -> Seen:
    """Runs the model on a uint8 image that already has the size to which files are resized."""
    probability_L, found = jax.device_get(self._look(image_HWC))
    return Seen(image_HWC, probability_L, found['rollout'][0], found['heads'][0])

  def open(self, encoded: bytes, cropped: bool = False) -> Seen:
    """Decodes and resizes an image, and runs the model on this image.

    Args:
      encoded: bytes of an image file.
      cropped: whether the image was already cropped. It is then resized only if its size is not the
        size to which files are resized.

    Raises:
      BadImage: the file is not an image, or has too many pixels.
    """
    decoded = decode_image(encoded, 'This file', self.exp.task.channels, MAX_PIXELS)
    size = self.exp.task.stored_size
    if cropped and decoded.size == size[::-1]:
      return self.see(np.asarray(decoded).reshape(*size, -1))
    return self.see(self.exp.fit(decoded, size))

  @property
  def head_names(self) -> list[str]:
    """Choices of the menu for attention heads: the mean of all heads, then each head."""
    return [MEAN, *(f'head {i + 1}' for i in range(self.heads))]

  @property
  def layers(self) -> list[str]:
    """Choices of the menu for layers: rollout, each block, and the pool if it has its own map."""
    blocks = [f'block {i + 1}' for i in range(self.exp.model.depth if self.rows else 0)]
    return [ROLLOUT, *blocks, *['pooling'] * (self.rows - len(blocks))]

  def guesses(self, seen: Seen) -> dict[str, float]:
    """Returns `{class name: probability}`; a repeated name is followed by its class index."""
    found = {}
    # ImageNet has two classes named `crane`.
    for i, name in enumerate(map(encodable, self.exp.task.class_names)):
      found[f'{name} ({i})' if name in found else name] = float(seen.probability_L[i])
    return found

  def labels(self, seen: Seen) -> str:
    """Returns the predicted labels as Markdown, for a model that can give several labels."""
    names, chosen = self.exp.task.class_names, self.exp.calibration.thresholds
    found = given_labels(seen.probability_L, chosen)
    return encodable(f'**Labels**: {", ".join(escaped(names[i]) for i in found) or "none"}')

  def picture(self, seen: Seen, layer: str, head: str) -> np.ndarray:
    """Returns the image, darkened where the attention is low: uint8 `[H, W, 3]`.

    Args:
      seen: the outputs of the model for the image.
      layer: one of `layers`.
      head: one of `head_names`; not used for the rollout, which combines all heads.
    """
    map_hw = np.ones((1, 1)) if seen.rollout_hw is None else seen.rollout_hw
    if layer != ROLLOUT:
      map_Khw = seen.heads_RKhw[self.layers.index(layer) - 1]
      map_hw = map_Khw.mean(axis=0) if head == MEAN else map_Khw[self.head_names.index(head) - 1]
    return light(seen.image_HWC, map_hw)


def light(image_HWC: np.ndarray, map_hw: np.ndarray) -> np.ndarray:
  """Enlarges an image, and darkens pixels with low attention: returns uint8 `[H', W', 3]`.

  Both sides are multiplied by the same integer: the smallest integer with which each side is at
  least `SHOWN` pixels long.
  """
  times = max(1, -(-SHOWN // min(image_HWC.shape[:2])))
  image_HWC = np.kron(image_HWC, np.ones((times, times, 1), np.uint8))
  light_HW = resize_map(map_hw / max(map_hw.max(), 1e-30), image_HWC.shape[:2])
  lit_HWC = np.round(image_HWC * (DARK + (1 - DARK) * light_HW[..., None])).astype(np.uint8)
  return np.broadcast_to(lit_HWC, (*lit_HWC.shape[:2], 3))


def build(
  viewer: Viewer, examples: Sequence[pathlib.Path], title: str, limits: Mapping[str, str]
) -> gr.Blocks:
  """Returns the demo page as Gradio blocks, ready to be launched.

  Args:
    viewer: the model.
    examples: image files to offer as examples; the page opens with the first file.
    title: title of the page.
    limits: what visitors must know about the model, as `{title: Markdown text}`.
  """
  seen = viewer.open(examples[0].read_bytes(), cropped=True) if examples else None
  title = encodable(title)
  with Page(title=title, analytics_enabled=False, delete_cache=(CLEAN, KEEP)) as page:
    gr.Markdown(f'# {escaped(title)}')
    parts = lay_out(viewer, examples, seen)
    listed = encodable('\n'.join(f'- **{name}**: {text}' for name, text in limits.items()))
    gr.Markdown(f'## What this model can and cannot do\n{listed}', elem_id='limits')
    state = gr.State(EXPIRED, time_to_live=KEEP)  # Gradio returns to this value after the time
    page.load(lambda: seen, None, state, queue=False, **QUIET)
    connect(viewer, examples, state, parts)
  return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


class Parts(NamedTuple):
  """The Gradio components that the event handlers of the page read or change."""

  file: gr.File
  gallery: gr.Gallery
  given: gr.Image
  picture: gr.Image
  layer: gr.Dropdown
  head: gr.Dropdown
  label: gr.Label
  labels: gr.Markdown


def lay_out(viewer: Viewer, examples: Sequence[pathlib.Path], seen: Seen | None) -> Parts:
  """Creates the components of the page; they show the image and the results in `seen`.

  Upload and examples are on the left; model input, attention and classes are on the right. If
  `seen` is None, no image is shown.
  """
  fixed = dict(interactive=False, buttons=[], min_width=120)
  with gr.Row():
    with gr.Column(min_width=280):
      file = gr.File(label='Image', type='binary', height=120, elem_id='file')
      gallery = gr.Gallery(
        [str(path) for path in examples],
        label='Examples',
        height='fit-content',
        allow_preview=False,
        interactive=False,
        buttons=[],
        visible=bool(examples),
        elem_id='examples',
      )
    with gr.Column(scale=2, min_width=280):
      with gr.Row():
        given = gr.Image(show(seen), label='Model input', elem_id='given', **fixed)
        lit = seen and viewer.picture(seen, ROLLOUT, MEAN)
        explains = bool(viewer.rows)
        picture = gr.Image(lit, label='Attention', elem_id='attention', visible=explains, **fixed)
      with gr.Row(visible=explains):
        layer = menu(viewer.layers, 'Layer', 'layer')
        head = menu(viewer.head_names, 'Head (for a single block)', 'head')
      several = viewer.exp.task.multi_label
      labels = gr.Markdown(seen and viewer.labels(seen), visible=several, elem_id='labels')
      guesses = seen and viewer.guesses(seen)
      label = gr.Label(guesses, label='Classes', num_top_classes=TOPK, elem_id='classes')
  return Parts(file, gallery, given, picture, layer, head, label, labels)


def menu(choices: Sequence[str], label: str, name: str) -> gr.Dropdown:
  """Returns a dropdown menu.

  Args:
    choices: the choices, of which the first is selected.
    label: text above the menu.
    name: HTML id of the menu.
  """
  return gr.Dropdown(choices, value=choices[0], label=label, elem_id=name, min_width=240)


def show(seen: Seen | None) -> np.ndarray | None:
  """Returns the model's input image, enlarged: uint8 `[H', W', 3]`; None if `seen` is None."""
  return None if seen is None else light(seen.image_HWC, np.ones((1, 1)))


def connect(viewer: Viewer, examples: Sequence[pathlib.Path], seen: gr.State, parts: Parts) -> None:
  """Registers functions that update the page when a file, example, layer or head is chosen.

  `seen` is Gradio's state of a visitor's session: the `Seen` of the image on the page, None if the
  page shows no image, or `EXPIRED`.
  """

  def check_menus(layer: str, head: str):
    if layer not in viewer.layers or head not in viewer.head_names:
      layers, heads = ', '.join(viewer.layers), ', '.join(viewer.head_names)
      raise gr.Error(
        f'Unknown layer or head. Layers: {layers}. Heads: {heads}.', print_exception=False
      )

  def classify(encoded: bytes | None, layer: str, head: str):
    if encoded is None:
      raise gr.Error('No file was given. Upload an image.', print_exception=False)
    check_menus(layer, head)
    try:
      seen = viewer.open(encoded)
    except BadImage as error:
      raise gr.Error(str(error), print_exception=False) from error
    return viewer.guesses(seen), viewer.picture(seen, layer, head), seen

  def take_example(event: Choice):
    if not isinstance(event.index, int) or not 0 <= event.index < len(examples):
      raise gr.Error(
        f'No example has the number {event.index!r:.50}. The page has {len(examples)} examples, '
        'which are counted from 0.',
        print_exception=False,
      )
    seen = viewer.open(examples[event.index].read_bytes(), cropped=True)
    return viewer.guesses(seen), seen

  def draw(seen: Seen | str | None, layer: str, head: str):
    check_menus(layer, head)
    if seen == EXPIRED:
      raise gr.Error('The image has expired. Choose the image again.', print_exception=False)
    if seen is None:
      return None, None, None
    return viewer.picture(seen, layer, head), show(seen), viewer.labels(seen)

  file, gallery, given, picture, layer, head, label, labels = parts
  for part in (file, layer, head):
    refuse_addresses(part)
  model = dict(concurrency_id='model', concurrency_limit=1)  # one limit for all calls of the model
  drawn = [picture, given, labels]
  emptied = dict(fn=lambda: (None,) * 5, outputs=[label, seen, *drawn], queue=False, **QUIET)
  uploaded = file.upload(**emptied).then(
    classify, [file, layer, head], [label, picture, seen], api_name='predict', **model
  )
  file.clear(**emptied)
  taken = gallery.select(take_example, None, [label, seen], api_visibility='private', **model)
  # The menus can change while an image waits, so `draw` reads them again at the end. `draw` is in
  # the queue, because the page shows errors of other functions without their text.
  for event in (uploaded.then, taken.then, layer.change, head.change):
    event(draw, [seen, layer, head], drawn, **QUIET)
  gallery.select(lambda: None, None, file, queue=False, **QUIET)
