"""Tests prediction, features and evaluation of images that keep their aspect ratio."""

import jax
import numpy as np
from PIL import Image
import pytest

from tests.conftest import call, error
import vit_jax
from vit_jax import opening
from vit_jax.evaluation import exact
from vit_jax.inference import prediction
from vit_jax.model import native_grid
from vit_jax.opening import Request

SIZES = [(30, 50), (50, 30), (9, 90), (40, 40), (8, 12)]  # height and width
MOST = 10


@pytest.fixture(scope='module')
def photos(tmp_path_factory, trained):
  """A folder with images of several shapes in the classes of the run, and its files by name."""
  folder, draw = tmp_path_factory.mktemp('photos'), np.random.RandomState(0)
  names = opening.from_workdir(trained[0])[0].task.class_names
  for split in ('train', 'test'):
    for i, name in enumerate(names):
      (folder / split / name).mkdir(parents=True)
      pixels = draw.randint(0, 256, (*SIZES[i % len(SIZES)], 3), np.uint8)
      Image.fromarray(pixels).save(folder / split / name / f'{split}{i}.png')
  return folder, sorted((folder / 'test').rglob('*.png'))


def alone(workdir, file, head=True):
  """Returns the probabilities, or the features, of one image, resized by Pillow."""
  exp, params, _ = opening.from_workdir(workdir)
  image = Image.open(file)
  h, w = native_grid((image.height, image.width), (4, 4), MOST)
  pixels = np.asarray(image.resize((4 * w, 4 * h), Image.Resampling.BICUBIC), np.float32)[None]
  model = exp.model.clone(position_grid=(2, 2), num_classes=exp.model.num_classes if head else None)
  out = jax.jit(model.apply)({'params': params}, pixels / 127.5 - 1)
  return np.asarray(jax.nn.softmax(out) if head else out)[0]


@pytest.mark.long
def test_predictions_equal_those_of_each_image_alone(trained, photos):
  workdir, (_, files) = trained[0], photos
  names = opening.from_workdir(workdir)[0].task.class_names
  for row in vit_jax.predict(workdir, files, len(names), max_patches=MOST):
    found = {guess['class']: guess['probability'] for guess in row['predictions']}
    np.testing.assert_allclose([found[n] for n in names], alone(workdir, row['file']), atol=2e-5)


@pytest.mark.long
def test_pooled_features_equal_those_of_each_image_alone(trained, photos):
  workdir, (_, files) = trained[0], photos
  arrays, _ = prediction.features(Request(workdir, max_patches=MOST), files, 'pooled')
  want = [alone(workdir, file, head=False) for file in files]
  np.testing.assert_allclose(arrays['feature'], want, atol=2e-5)


@pytest.mark.parametrize(
  'batch_size',
  [pytest.param('3', marks=pytest.mark.slow), pytest.param('64', marks=pytest.mark.long)],
)
def test_evaluation_scores_each_image_as_alone(trained, photos, batch_size):
  workdir, (folder, files) = trained[0], photos
  overrides = {'data.source': f'folder:{folder}', 'eval_batch_size': batch_size}
  found = exact.evaluate(workdir, overrides, max_patches=MOST)
  names = opening.from_workdir(workdir)[0].task.class_names
  share = [alone(workdir, file)[names.index(file.parent.name)] for file in files]
  hits = [alone(workdir, file).argmax() == names.index(file.parent.name) for file in files]
  assert found['loss'] == pytest.approx(-np.log(share).mean(), abs=1e-4)
  assert found['accuracy'] == np.mean(hits) and found['max_patches'] == MOST


@pytest.mark.slow
def test_images_that_fill_the_patches_exactly_are_evaluated_as_usual(trained):
  usual, found = exact.evaluate(trained[0]), exact.evaluate(trained[0], max_patches=4)
  assert found['accuracy'] == usual['accuracy'] and 'max_patches' not in usual
  assert found['loss'] == pytest.approx(usual['loss'], abs=1e-5)


@pytest.mark.slow
def test_the_flag_works_on_the_command_line(trained, photos, capsys):
  images = f'--images={photos[0] / "test"}'
  where = f'--workdir={trained[0]}'
  code, out, _ = call(capsys, '--mode=predict', where, images, '--max_patches=10', '--topk=1')
  assert not code and out.count('%') == len(photos[1])
  code, out, _ = call(capsys, '--mode=eval', where, '--max_patches=4')
  assert not code and 'max_patches 4' in out
  assert 'max_patches must be a positive integer, got 0' in error(
    capsys, '--mode=predict', where, images, '--max_patches=0'
  )
  tokens = '--features=tokens', f'--out={photos[0]}/out.npz'
  assert '--features=tokens needs images of one size' in error(
    capsys, '--mode=predict', where, images, '--max_patches=10', *tokens
  )
  assert '--max_patches' in error(capsys, '--mode=visualize', where, '--max_patches=10')
