"""Tests `--mode=visualize`: every figure with available data, and a self-contained report."""

import base64
from html.parser import HTMLParser
import json
import shutil
import types
import warnings

from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from tests.conftest import DATA, call, error, small_config
import vit_jax
from vit_jax import figures, opening
from vit_jax.data.memory import Examples
from vit_jax.distributed import devices, replicate
from vit_jax.experiment import assemble
from vit_jax.figures import canvas, charts, draw, facts, gallery, maps, pictures, report
from vit_jax.figures import subject as subject_lib
from vit_jax.opening import Request
from vit_jax.training import trainer
from vit_jax.workdir import Calibration, Task, save_calibration

PICTURES = set(pictures.PICTURES) - {'reconstruction'}  # only of runs without labels
OF_TEST = {'confusion', 'reliability', 'coverage', 'mistakes', 'neighbours'}
OF_DATA = {*OF_TEST, 'patches', 'distance', 'rollout', 'heads', 'components'}


class Page(HTMLParser):
  """Parses a page's embedded images, external links and text, and checks that tags close."""

  VOID = ('meta', 'img')

  def __init__(self, path):
    super().__init__()
    self.images, self.links, self.text, self.open = [], [], '', []
    self.feed(path.read_text())
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    for name, value in attrs:
      if name in ('src', 'href'):
        (self.images if value.startswith('data:image/png;base64,') else self.links).append(value)
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


@pytest.fixture
def workdir(trained, tmp_path):
  """A copy of a finished run, which the test may write to."""
  return shutil.copytree(trained[0], tmp_path / 'run <&>')


@pytest.fixture
def photos(tmp_path):
  """A folder with three images whose sizes differ from the model's input."""
  folder = tmp_path / 'photos'
  folder.mkdir()
  random = np.random.RandomState(0)
  for i, size in enumerate([(40, 30), (9, 50), (20, 20)]):
    Image.fromarray(random.randint(0, 256, (*size, 3), np.uint8)).save(folder / f'{i}.png')
  return folder


def names(folder):
  return {path.stem for path in (folder / 'figures').glob('*.png')}


@pytest.mark.slow
def test_visualize_draws_every_figure_of_a_finished_run(capsys, trained, workdir):
  code, out, _ = call(capsys, '--mode=visualize', f'--workdir={workdir}')
  drawn = PICTURES - {'mistakes', 'neighbours'} if 'mistakes' not in names(workdir) else PICTURES
  assert not code and names(workdir) == drawn
  assert out.splitlines()[-1] == str(workdir / 'report.html')
  assert len(out.splitlines()) == len(drawn) + 1
  for name in drawn:
    with Image.open(workdir / 'figures' / f'{name}.png') as image:
      assert image.width == 1200 and image.height < 1500, name

  page = Page(workdir / 'report.html')
  order = [name for name in pictures.PICTURES if name in drawn]
  files = [(workdir / 'figures' / f'{name}.png').read_bytes() for name in order]
  assert [base64.b64decode(image.partition(',')[2]) for image in page.images] == files
  assert not page.links and 'http' not in (workdir / 'report.html').read_text()
  result = trained[1]
  for text in ('run <&>', f'{result["test_accuracy"]:.2%}', f'{result["params"]:,}', '256', '32'):
    assert text in page.text
  changed, unchanged = page.text.split('keys at their default')
  assert 'model.depth' in changed and 'optimizer.momentum' in unchanged
  assert 'model.depth' not in unchanged and 'optimizer.momentum' not in changed
  again = gallery.visualize(Request(workdir))
  assert [path.read_bytes() for path in again[:-1]] == files  # same run, so same bytes


@pytest.mark.slow
def test_scores_match_the_run_result(trained):
  workdir, result = trained
  subject = subject_lib.collect(Request(workdir), None)
  right = subject.scores.predicted_N == subject.test.label_N
  assert right.mean() == result['test_accuracy'] and len(right) == result['examples']
  assert ((subject.scores.confidence_N > 0.1) & (subject.scores.confidence_N <= 1)).all()
  np.testing.assert_array_equal(
    subject.shown, subject_lib.choose_images(subject.test, subject.exp)[: subject_lib.SHOWN]
  )
  assert subject.attention.measured == subject_lib.MEASURED
  assert subject.attention.distance_DK.shape == (2, 4)


def test_attention_distance_ignores_padding(monkeypatch):
  def summary(model, params, image_BHWC):
    level_B = image_BHWC.mean(axis=(1, 2, 3))
    return dict.fromkeys(('rollout', 'heads', 'distance'), level_B[:, None, None])

  monkeypatch.setattr(maps, 'attention_summary', summary)
  exp = assemble(small_config(), Task(('a', 'b'), (8, 8), 3))
  level_B = np.arange(11, dtype=np.uint8) ** 2  # 8 at once, and then 3
  image_BHWC = np.broadcast_to(level_B[:, None, None, None], (11, 8, 8, 3))
  found = subject_lib.attention_over(exp, {}, image_BHWC, devices.make_mesh(2))
  want_B = level_B / 127.5 - 1
  np.testing.assert_allclose(found.distance_DK, [[want_B.mean()]], rtol=1e-5)
  np.testing.assert_allclose(found.rollout[:, 0, 0], want_B[:8], rtol=1e-5)
  assert found.measured == 11


def test_chosen_images_are_spread_over_the_classes_and_start_with_the_most_contrast():
  image = np.arange(300, dtype=np.uint16)[:, None, None, None].astype(np.uint8)
  image = np.concatenate([image, 0 * image], axis=2)  # contrast grows up to image 255
  test = Examples(image, np.arange(300) % 4)
  exp = types.SimpleNamespace(task=types.SimpleNamespace(class_names=list('abcd')))
  found = subject_lib.choose_images(test, exp)[:, 0, 0, 0].tolist()
  assert found == [7, 6, 5, 4, 3, 2, 1, 0, *range(8, 128)]


@pytest.mark.long
def test_visualize_draws_given_images_and_skips_broken_ones(capsys, workdir, photos):
  (photos / 'broken.png').write_bytes(b'no image')
  flags = ['--mode=visualize', f'--workdir={workdir}']
  code, _, err = call(capsys, *flags, f'--images={photos}', '--config.eval_batch_size=100')
  assert not code and 'broken.png: not a readable image' in err
  assert 'over 3 images' in Page(workdir / 'report.html').text
  err = error(capsys, *flags, f'--images={photos}/broken.png')
  assert 'none of 1 files is a readable image' in err
  assert 'no images in this folder' in error(capsys, *flags, f'--images={workdir}/checkpoints')


@pytest.mark.parametrize('name', ['report.html', 'figures/curves.png'])
def test_files_of_others_are_not_replaced(capsys, photos, tmp_path, name):
  (tmp_path / 'paper' / 'figures').mkdir(parents=True)
  (tmp_path / 'paper' / name).write_text('mine')
  weights, out = f'--init={DATA}/paper_token/weights.npz', f'--out={tmp_path}/paper'
  text = error(capsys, '--mode=visualize', weights, f'--images={photos}', out)
  assert f'{name} already exists and was not written by' in text
  assert (tmp_path / 'paper' / name).read_text() == 'mine'


@pytest.mark.slow
@pytest.mark.slow_after_first
@pytest.mark.parametrize('name', ['paper_token', 'timm_map', 'hf_backbone', 'paper_hybrid'])
def test_visualize_draws_published_weights_without_a_run(capsys, photos, tmp_path, name):
  left_out = {'filters'} if name == 'paper_hybrid' else set()
  out = tmp_path / 'out'
  init = f'--init={DATA}/{name}' + ('/weights.npz' if name.startswith('paper') else '')
  code, _, _ = call(capsys, '--mode=visualize', init, f'--images={photos}', f'--out={out}')
  assert not code
  assert names(out) == PICTURES - {'curves', *OF_TEST} - left_out
  page = Page(out / 'report.html')
  code, _, _ = call(capsys, '--mode=visualize', init, f'--images={photos}', f'--out={out}')
  assert not code  # the second call replaces the figures of the first
  assert 'weights of --init come without metrics' in page.text
  assert ('feature map' in page.text) == bool(left_out)
  assert ('probe attends to' in page.text) == (name == 'timm_map')
  assert ('has no head' in page.text) == (name == 'hf_backbone')


@pytest.mark.long
def test_figures_of_moved_data_are_skipped_until_its_source_is_overridden(capsys, tmp_path):
  random = np.random.RandomState(0)
  for label in 'ab':
    (tmp_path / 'photos' / label).mkdir(parents=True)
    for i in range(10):
      pixels = random.randint(0, 256, (8, 8, 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / 'photos' / label / f'{i}.png')
  workdir = tmp_path / 'run'
  config = small_config(**{
    'data.source': f'folder:{tmp_path}/photos', 'batch_size': '4', 'eval_every': '0',
  })  # fmt: skip
  trainer.train(config, workdir)
  gallery.visualize(Request(workdir))
  assert {'confusion', 'rollout'} <= names(workdir)

  (tmp_path / 'photos').rename(tmp_path / 'elsewhere')
  code, _, err = call(capsys, '--mode=visualize', f'--workdir={workdir}')
  assert not code and 'Skipped rollout.png: cannot read the test data' in err
  assert names(workdir) == PICTURES - OF_DATA  # the figures of the first call are removed
  assert 'cannot read the test data' in Page(workdir / 'report.html').text
  override = f'--config.data.source=folder:{tmp_path}/elsewhere'
  crop = '--config.data.crop=0.9'
  assert '/photos' in error(capsys, '--mode=visualize', f'--workdir={workdir}', crop)
  code, _, _ = call(capsys, '--mode=visualize', f'--workdir={workdir}', override)
  assert not code and {'confusion', 'rollout'} <= names(workdir)


@pytest.mark.slow
def test_report_of_an_unfinished_run_shows_its_latest_metrics(capsys, workdir):
  (workdir / 'result.json').unlink()
  gallery.visualize(Request(workdir))
  text = Page(workdir / 'report.html').text
  assert '32, not finished' in text and 'after step 32' in text
  shutil.rmtree(workdir / 'checkpoints')
  code, _, err = call(capsys, '--mode=visualize', f'--workdir={workdir}')
  assert not code and names(workdir) == {'curves'}
  assert 'has not saved a checkpoint' in err and 'model.depth' in Page(workdir / 'report.html').text
  flags = ['--mode=visualize', f'--workdir={workdir}', '--config.data.dir=x']
  assert 'no checkpoint' in error(capsys, *flags)


@pytest.mark.slow
def test_report_of_a_run_resumed_after_its_result_shows_not_finished(workdir):
  line = {'step': 40, 'split': 'train', 'loss': 1.0, 'accuracy': 0.5}
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps(line) + '\n')
  gallery.visualize(Request(workdir))
  assert '40, not finished' in Page(workdir / 'report.html').text


@pytest.mark.long
def test_visualize_ignores_damaged_metrics_and_results(capsys, workdir):
  (workdir / 'result.json').write_text('{"steps": 32, "test_accuracy": 0.25, "test_loss": null}')
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 32}\n{"step": "x", "split": "test"}\n{"step": 32, "split": "test"}\n[1\n')
    file.write('{"step": 32, "split": "train", "loss": null, "accuracy": {}}\n')
    file.write('{"step": 32, "split": "test", "loss": "low", "accuracy": null}\n')
  assert not call(capsys, '--mode=visualize', f'--workdir={workdir}')[0]
  text = Page(workdir / 'report.html').text
  assert '25.00%' in text and 'test loss' not in text and 'curves' in names(workdir)
  (workdir / 'result.json').write_text('{"steps": "all"}')
  gallery.visualize(Request(workdir))
  assert '32, not finished' in Page(workdir / 'report.html').text
  export = ['--mode=export', f'--workdir={workdir}', '--format=npz', f'--out={workdir}/out']
  assert not call(capsys, *export)[0]
  assert '| accuracy | unknown |' in (workdir / 'out' / 'README.md').read_text()


def test_a_report_shows_whether_the_run_is_finished(trained):
  workdir, result = trained
  lines = subject_lib.read_lines(workdir)
  nothing = [maps.Missing('it is not looked at')] * 6
  found = facts.numbers(pictures.Subject(lines, *nothing), workdir)
  assert found['training steps'] == '32' and found['test images'] == '256'
  assert found['test accuracy'] == f'{result["test_accuracy"]:.2%}'
  more = [*lines, {'step': 33, 'split': 'train', 'loss': 1.0}]
  found = facts.numbers(pictures.Subject(more, *nothing), workdir)
  assert found['training steps'] == '33, not finished' and 'test images' not in found


@pytest.mark.parametrize('accuracy, text', [(0.5, '1.2500 nats'), (None, '1.2500')])
def test_only_the_loss_of_a_classifier_is_in_nats(tmp_path, accuracy, text):
  result = {'steps': 9, 'test_loss': 1.25, 'test_accuracy': accuracy, 'seconds': 4321.5}
  (tmp_path / 'result.json').write_text(json.dumps(result))
  subject = pictures.Subject([{'step': 9, 'split': 'train'}], *[maps.Missing('none')] * 6)
  found = facts.numbers(subject, tmp_path)
  assert found['test loss'] == text and ('test accuracy' in found) == (accuracy is not None)
  assert found['seconds, including compilation'] == '4,322'


@pytest.mark.long
def test_checkpoint_without_metrics_and_config_is_drawn(workdir):
  for name in ('metrics.jsonl', 'result.json', 'config.json'):
    (workdir / name).unlink()
  gallery.visualize(Request(workdir))
  assert 'curves' not in names(workdir) and 'rollout' in names(workdir)


def test_report_escapes_all_text(tmp_path):
  bad = '<script>"&\''
  path = tmp_path / 'figure.png'
  Image.new('L', (1, 1)).save(path)
  picture = report.Picture(path, bad, bad)
  parts = bad, bad, {bad: bad}, [(bad,) * 3], {bad: bad}, [picture], {bad: bad}, [(bad,) * 5]
  report.write_report(tmp_path / 'r.html', report.Report(*parts))
  text = (tmp_path / 'r.html').read_text()
  assert '<script' not in text and f'alt="{report.escape(bad)}"' in text
  assert Page(tmp_path / 'r.html').text.count(bad) == 19


def test_images_are_drawn_as_the_model_sees_them():
  overrides = {'data.image_size': '24', 'data.mean': '0.4,0.5,0.6', 'data.std': '0.2,0.3,0.4'}
  exp = assemble(small_config(**overrides), Task(('a', 'b'), (12, 12), 3))
  small = np.random.RandomState(0).choice([0, 255], (12, 12, 3)).astype(np.uint8)
  (seen,) = subject_lib.as_seen(exp, small[None]).astype(int)
  channels = [Image.fromarray(small[..., c].astype(np.float32)) for c in range(3)]
  large = [np.asarray(one.resize((24, 24), Image.Resampling.BICUBIC)) for one in channels]
  want = np.clip(np.stack(large, axis=-1), 0, 255)  # bicubic interpolation overshoots
  # The border is left out, because Pillow extends the image differently there.
  np.testing.assert_allclose(seen[4:-4, 4:-4], want[4:-4, 4:-4], atol=0.51)


def test_answers_keep_the_index_of_each_example_if_devices_pad_the_batches(trained):
  exp, params, _ = opening.from_workdir(trained[0], {'eval_batch_size': '3'})
  images = np.random.RandomState(0).randint(0, 256, (7, 8, 8, 3), np.uint8)
  mesh = devices.make_mesh()
  assert mesh.size == 2  # so that each batch of 3 examples has a row of padding
  test = Examples(images, np.arange(7, dtype=np.int32))
  found = subject_lib.answers(exp, replicate(mesh, params), test, mesh)
  assert found.index_N.tolist() == found.label_N.tolist() == list(range(7))


def test_a_confusion_matrix_of_very_many_classes_is_not_drawn():
  with pytest.raises(maps.Missing, match='more than 2,000 classes'):
    charts.confusion(np.zeros(1, int), np.zeros(1, int), 2001)


@pytest.mark.parametrize('classes', [2, 30, 1000])
def test_confusion_matrix_is_drawn_for_few_and_many_classes(classes, tmp_path):
  count = np.random.RandomState(0).randint(1, 9, (classes, classes))
  names = [f'$x$ {i} ' + 'long ' * 9 for i in range(classes)]
  figure = charts.draw_confusion(count, charts.class_accuracy(count), names)
  matrix, bars = figure.axes[0], figure.axes[1]
  shown = matrix.images[0].get_array()
  np.testing.assert_allclose(shown.sum(axis=1), 1)  # each row shows shares of a true class
  assert bars.patches[0].get_width() in np.diag(shown)
  named = [text.get_text() for text in bars.get_yticklabels()]
  assert len(named) == min(classes, 20 if classes > 40 else 40)
  canvas.save_figure(figure, tmp_path / 'c.png')
  with Image.open(tmp_path / 'c.png') as image:
    assert image.width == 1200


@pytest.mark.slow
def test_class_names_in_any_script_are_drawn_without_warnings(tmp_path, caplog):
  names = ['two\nlines\tand more', '狗', 'कुत्ता', '🐕']
  figures = [
    charts.draw_confusion(np.eye(4, dtype=int), np.ones(4), names),
    draw.draw_mistakes(np.zeros((4, 8, 8, 3), np.uint8), names, names, [0.5] * 4),
  ]
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    for figure in figures:
      canvas.save_figure(figure, tmp_path / 'c.png')
  assert not caplog.messages  # matplotlib logs a message if a font is not installed
  assert figures[0].axes[1].get_yticklabels()[0].get_text() == 'two lines and m…'


def test_class_without_examples_is_drawn_and_labelled(tmp_path):
  figure = charts.draw_confusion(np.array([[3, 1], [0, 0]]), np.array([0.75, np.nan]), ['a', 'b'])
  numbers = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
  assert numbers == {(0, 0): '75', (1, 0): '25'}  # (predicted, true), as the shades
  canvas.save_figure(figure, tmp_path / 'c.png')
  assert 'no example' in [text.get_text() for text in figure.axes[1].texts]


@pytest.mark.parametrize('count', [20, 21, 40, 41])
def test_the_bar_of_a_class_without_examples_says_so_for_any_number_of_classes(count):
  accuracy_L = np.where(np.arange(count) == 1, np.nan, 1.0)
  accuracy_L[2:] = np.nan if count > charts.LABELLED else 1.0  # NaN is among the lowest
  axis = Figure().subplots()
  charts.class_bars(axis, accuracy_L, [f'class {i}' for i in range(count)])
  found = [text.get_text() for text in axis.texts]
  assert found.count('no example') == (charts.LOWEST - 1 if count > charts.LABELLED else 1)


@pytest.mark.parametrize('fitted', [False, True])
def test_reliability_bars_are_the_accuracies_of_the_bins(fitted, tmp_path):
  random = np.random.RandomState(0)
  confidence, right = random.uniform(0.5, 1, 300), random.uniform(size=300) < 0.8
  bins = figures.reliability(confidence, right)
  figure = figures.draw_reliability(bins, bins if fitted else None)
  left, counts = figure.axes
  heights = [bar.get_height() for bar in left.patches]
  np.testing.assert_allclose(heights, np.nan_to_num(bins['accuracy']))
  assert sum(bar.get_height() for bar in counts.patches[:15]) == pytest.approx(1)
  assert ('without temperature' in left.get_legend_handles_labels()[1]) == fitted
  canvas.save_figure(figure, tmp_path / 'c.png')


def test_the_coverage_curve_ends_at_the_accuracy_of_all_examples():
  random = np.random.RandomState(0)
  confidence, right = random.uniform(0.5, 1, 300), random.uniform(size=300) < 0.8
  figure = figures.draw_coverage(figures.coverage_curve(confidence, right))
  accuracy, threshold = (axis.lines[0].get_xydata() for axis in figure.axes)
  assert accuracy[-1].tolist() == pytest.approx([1, right.mean()])
  assert threshold[-1].tolist() == pytest.approx([1, confidence.min()])
  assert figure.axes[0].get_ylim()[0] <= accuracy[:, 1].min()


@pytest.mark.slow
def test_the_report_shows_the_scores_of_each_class_and_how_far_to_trust_them(workdir, monkeypatch):
  save_calibration(workdir, 32, Calibration(2.5, examples=99))
  trust, calls = pictures.trust, []
  monkeypatch.setattr(pictures, 'trust', lambda *args: calls.append(args) or trust(*args))
  gallery.visualize(Request(workdir))
  assert len(calls) == 1  # numbers, classes and reliability share the result
  result = vit_jax.evaluate(workdir)
  text = Page(workdir / 'report.html').text
  low, high = result['accuracy_interval']
  for shown in (
    f'{result["accuracy"]:.2%}, 95% interval {low:.2%} to {high:.2%}',
    f'{result["ece"]:.2%}', '2.5, fitted on 99 validation images',
    f'without the temperature 2.5, it would be {result["ece_uncalibrated"]:.2%}',
  ):  # fmt: skip
    assert shown in text
  rows = facts.class_rows(subject_lib.collect(Request(workdir), None))
  order = sorted(result['per_class'], key=lambda name: result['per_class'][name]['f1'] or 0)
  assert {row[0] for row in rows} == set(order)
  assert [row[3] for row in rows] == [f'{result["per_class"][row[0]]["f1"]:.2%}' for row in rows]
  assert rows[0][3] == f'{result["per_class"][order[0]]["f1"]:.2%}'


def test_the_report_folds_the_table_of_many_classes():
  rows = [(f'class {i}', *['1%'] * 4) for i in range(30)]
  shown, folded = report.class_table(rows).split('<details>')
  assert 'class 19' in shown and 'class 20' not in shown
  assert '10 more' in folded and 'class 20' in folded
  assert 'details' not in report.class_table(rows[:20])


def test_curves_show_the_recorded_metrics():
  lines = [
    {'step': 1, 'split': 'train', 'loss': 2.0, 'accuracy': 0.1},
    {'step': 2, 'split': 'test', 'loss': 1.5, 'accuracy': 0.3},
    {'step': 3, 'split': 'train', 'loss': 1.0, 'accuracy': 0.4},
    {'step': 3, 'split': 'train', 'note': 1.0},
  ]
  loss, accuracy = draw.draw_curves(lines).axes
  drawn = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
  assert drawn == {'train': [[1, 2.0], [3, 1.0]], 'test': [[2, 1.5]]}
  assert accuracy.lines[0].get_xydata().tolist() == [[1, 0.1], [3, 0.4]]
  for axis in (loss, accuracy):
    assert axis.get_xlabel() and axis.get_ylabel()


def test_mosaic_places_tiles_in_rows_and_columns():
  tiles = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2).astype(np.uint8)
  image = canvas.mosaic(tiles, gap=1)
  assert image.shape == (5, 8)
  np.testing.assert_array_equal(image[3:, 6:], tiles[1, 2])
  assert (image[2] == canvas.GROUND).all() and (image[:, 5] == canvas.GROUND).all()


def test_resized_maps_interpolate_between_patch_centres():
  want = [[0, 0.25, 0.75, 1]] * 2
  np.testing.assert_allclose(canvas.resize_map(np.array([[0.0, 1.0]]), (2, 4)), want)


def test_lit_images_are_dark_where_rollout_is_zero():
  image = np.full((1, 2, 2, 3), 200, np.uint8)
  figure = draw.draw_rollout(image, np.array([[[0.2, 0.0], [0.1, 0.1]]]))
  lit = figure.axes[4].images[0].get_array()
  np.testing.assert_array_equal(lit[..., 0], [[200, 0], [100, 100]])
  even = figure.axes[8].images[0].get_array()
  np.testing.assert_allclose(even, [[2, 0], [1, 1]])


def test_attention_distances_are_drawn_over_their_blocks():
  figure = draw.draw_attention_distance(np.array([[1.0, 3.0], [10.0, 20.0], [5.0, 6.0]]), 8.0)
  (axis,) = figure.axes
  dots = axis.collections[0].get_offsets().tolist()
  assert dots == [[1, 1], [1, 3], [2, 10], [2, 20], [3, 5], [3, 6]]
  lines = {line.get_label(): line.get_ydata() for line in axis.lines}
  assert list(lines['mean of the heads']) == [2, 15, 5.5] and set(lines['even attention']) == {8}
  assert axis.get_ylim()[1] > 20


def tile_of(axis, row, column, shape):
  """Returns the values of a tile that `show_mosaic` has drawn, by the places of its ticks."""
  times = -(-16 // min(shape))  # each value is repeated, so that a side has at least 16 pixels
  image = np.asarray(axis.images[0].get_array())
  ends = [n * times for n in shape]
  centre = axis.get_yticks()[row], axis.get_xticks()[column]
  y, x = (round(middle - (end - 1) / 2) for middle, end in zip(centre, ends))
  return image[y : y + ends[0] : times, x : x + ends[1] : times]


def test_each_attention_map_is_scaled_by_its_own_largest_value():
  map_RKhw = np.random.default_rng(0).uniform(0.1, 1, (3, 2, 4, 4))
  map_RKhw[1, 1] *= 100
  names = ['block 1', 'block 2', 'pool']
  image = np.zeros((8, 8, 3), np.uint8)
  axis = draw.draw_head_attention(image, map_RKhw, names).axes[1]
  assert [text.get_text() for text in axis.get_yticklabels()] == names
  assert [text.get_text() for text in axis.get_xticklabels()] == ['1', '2']
  for (r, k), map_hw in ((at, map_RKhw[at]) for at in np.ndindex(3, 2)):
    np.testing.assert_allclose(tile_of(axis, r, k, (4, 4)), map_hw / map_hw.max())


def test_each_map_of_positions_belongs_to_the_patch_of_its_labels():
  similarity_hwhw = np.random.default_rng(0).uniform(-1, 1, (40, 3, 40, 3))
  axis = draw.draw_position_similarity(similarity_hwhw).axes[0]
  rows, columns = (
    [int(text.get_text()) for text in labels()]
    for labels in (axis.get_yticklabels, axis.get_xticklabels)
  )
  assert (len(rows), rows[0], rows[-1], columns) == (16, 1, 40, [1, 2, 3])
  assert axis.images[0].get_clim() == (-1, 1)
  for r, c in np.ndindex(16, 3):
    want_hw = similarity_hwhw[rows[r] - 1, columns[c] - 1]
    np.testing.assert_array_equal(tile_of(axis, r, c, (40, 3)), want_hw)


def test_filters_are_grey_at_zero_and_scaled_by_their_largest_value():
  filter_FpqC = np.array([[[[0.0], [0.2]], [[-0.4], [0.4]]], [[[0.0], [1.0]], [[3.0], [-2.0]]]])
  figure = draw.draw_filters(filter_FpqC, np.array([0.875, 0.125]))
  drawn = [axis.images[0].get_array().tolist() for axis in figure.axes]
  assert drawn == [[[128, 191], [0, 255]], [[128, 170], [255, 42]]]
  assert [axis.get_title() for axis in figure.axes] == ['87.5%', '12.5%']


def test_the_classes_with_the_lowest_accuracy_have_bars():
  accuracy_L = np.linspace(1, 0, 50)
  accuracy_L[[3, 49]] = np.nan, 0.5
  names = [f'c{i}' for i in range(50)]
  figure = charts.draw_confusion(np.ones((50, 50), int), accuracy_L, names)
  bars = figure.axes[1]
  lowest = [*range(48, 28, -1)]
  assert [text.get_text() for text in bars.get_yticklabels()] == [f'c{i}' for i in lowest]
  assert [bar.get_width() for bar in bars.patches] == accuracy_L[lowest].tolist()


def test_a_mistake_has_its_true_class_and_its_wrong_class():
  image_NHWC = np.stack([np.full((4, 6, 3), level, np.uint8) for level in (10, 200)])
  figure = draw.draw_mistakes(image_NHWC, ['cat', 'dog'], ['hen', 'fox'], [0.975, 0.5])
  titles = [(axis.get_title(), axis.texts[0].get_text()) for axis in figure.axes[:2]]
  assert titles == [('true: cat', 'model: hen, 97.5%'), ('true: dog', 'model: fox, 50.0%')]
  assert [axis.images[0].get_array().max() for axis in figure.axes[:2]] == [10, 200]


@pytest.mark.slow_after_first
@pytest.mark.parametrize('channels', [1, 3])
def test_figures_can_be_drawn_for_images_of_any_shape(channels, tmp_path):
  random = np.random.RandomState(0)
  image = random.randint(0, 256, (3, 8, 12, channels), np.uint8)
  figures = [
    draw.draw_patches(image[0], maps.patches(image[0], (2, 3))),
    draw.draw_rollout(image, random.uniform(size=(3, 4, 4))),
    draw.draw_head_attention(
      image[0], random.uniform(size=(40, 20, 4, 4)), list(map(str, range(40)))
    ),
    draw.draw_mistakes(image, ['a'] * 3, ['b'] * 3, [1.0, 0.5, 0.1]),
    draw.draw_filters(random.normal(size=(9, 2, 3, channels)), np.full(9, 1 / 9)),
    draw.draw_position_similarity(random.uniform(size=(20, 3, 20, 3))),
    draw.draw_attention_distance(random.uniform(size=(1, 3)), 0.5),
  ]
  for figure in figures:
    canvas.save_figure(figure, tmp_path / 'f.png')
    with Image.open(tmp_path / 'f.png') as drawn:
      assert drawn.width == 1200 and drawn.height < 1500


def test_class_name_with_invalid_utf8_is_shortened_without_error():
  assert canvas.short('K\udcc3\udca4fer  Käfer') == 'K??fer Käfer'
