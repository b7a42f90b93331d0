"""Draws figures of what a model attends to and has learned, and writes a report with them.

`maps.py` computes the arrays for the figures. `draw.py` and `charts.py` draw these arrays.
`gallery.py` draws all figures of a run and writes the report.
"""

from vit_jax.evaluation import coverage_curve, reliability
from vit_jax.figures.canvas import resize_map, save_figure
from vit_jax.figures.charts import (
  class_accuracy,
  confusion,
  draw_confusion,
  draw_coverage,
  draw_reliability,
)
from vit_jax.figures.components import (
  component_colours,
  component_maps,
  dense_features,
  principal_components,
)
from vit_jax.figures.draw import (
  draw_attention_distance,
  draw_components,
  draw_curves,
  draw_filters,
  draw_head_attention,
  draw_mistakes,
  draw_patches,
  draw_position_similarity,
  draw_rollout,
)
from vit_jax.figures.gallery import visualize
from vit_jax.figures.maps import (
  Missing,
  attention_summary,
  attentions,
  filters,
  grid_of,
  head_attention,
  mean_attention_distance,
  mistakes,
  patch_distances,
  patches,
  position_embeddings,
  position_similarity,
  rollout,
)

__all__ = [
  'Missing', 'attention_summary', 'attentions', 'class_accuracy', 'component_colours',
  'component_maps', 'confusion', 'coverage_curve', 'dense_features', 'draw_attention_distance',
  'draw_components', 'draw_confusion', 'draw_coverage', 'draw_curves', 'draw_filters',
  'draw_head_attention', 'draw_mistakes', 'draw_patches', 'draw_position_similarity',
  'draw_reliability', 'draw_rollout', 'filters', 'grid_of', 'head_attention',
  'mean_attention_distance', 'mistakes', 'patch_distances', 'patches', 'position_embeddings',
  'position_similarity', 'principal_components', 'reliability', 'resize_map', 'rollout',
  'save_figure', 'visualize',
]  # fmt: skip
