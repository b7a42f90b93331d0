"""Checks `labels:<file>`: splits, several labels, equivalence with `folder:`, and wrong files."""

import dataclasses
import json
import os
import pathlib
import shutil
import unicodedata

import jax
import numpy as np
from PIL import Image
import pytest

from vit_jax.data import batching, image, labels, memory, source, sources, stream
from vit_jax.data.folder import Files
from vit_jax.distributed import devices, sharding
from vit_jax.workdir import trained

NAMES = [f'photos/{i:02}.jpg' for i in range(40)]


def touch(root, names=NAMES):
  """Creates empty files, because a source checks only file names."""
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def table(rows, header='path,label'):
  return '\n'.join([header, *(','.join(row) for row in rows)]) + '\n'


def opened(root, text, name='labels.csv', data_dir=''):
  (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  return sources.open_source(f'labels:{root / name}', data_dir, (4, 4))


def members(found, split):
  """Returns {path: label} of a split; a label is a number or a tuple of numbers."""
  plain = lambda label: label if isinstance(label, int) else tuple(np.flatnonzero(label).tolist())
  examples = found.read(split, range(found.sizes[split]))
  return {path: plain(label) for _, path, label in examples}


SINGLE = [(name, 'ab'[i % 2]) for i, name in enumerate(NAMES)]
SPLIT = 'path,label,split'
SEVERAL = [(name, ('a', 'b;c', '', 'c')[i % 4]) for i, name in enumerate(NAMES)]


def test_a_list_of_class_folders_is_split_as_the_folder(tmp_path):
  names = [f'{c}/{i}.jpg' for c in ('cat', 'dog', 'ant') for i in range(20)]
  touch(tmp_path / 'photos', names)
  folder = sources.open_source(f'folder:{tmp_path}/photos', '', (4, 4))
  rows = [(f'photos/{name}', name.split('/')[0]) for name in reversed(names)]
  found = opened(tmp_path, table([(path.removeprefix('photos/'), c) for path, c in rows]),
                 data_dir=str(tmp_path / 'photos'))  # fmt: skip
  assert found.class_names == folder.class_names == ('ant', 'cat', 'dog')
  for split in ('train', 'test', 'train[:50%]'):
    pieces = found.pieces(split)
    assert pieces == folder.pieces(split)
  for split in ('train', 'test'):
    assert list(members(found, split).items()) == list(members(folder, split).items())
  assert found.fingerprint == folder.fingerprint
  assert found.sizes['test']


def test_the_images_of_a_run_on_a_folder_are_left_out_of_a_test_on_a_list(tmp_path):
  names = [f'{c}/{i}.jpg' for c in ('cat', 'dog') for i in range(20)]
  touch(tmp_path, names)
  folder = sources.open_source(f'folder:{tmp_path}', '', (4, 4))
  known = trained.hash_training_files(folder, ['train'], trained.TrainingFiles())
  rows = [(name, name.split('/')[0], 'train' if i % 3 else 'test') for i, name in enumerate(names)]
  found = opened(tmp_path, table(rows, SPLIT))
  kept, left_out = trained.leave_out_trained(found, 'test', known)
  examples = [kept.read(name, range(a, b)) for name, a, b in kept.pieces('test')]
  paths = {path for part in examples for _, path, _ in part}
  assert paths == members(found, 'test').keys() & members(folder, 'test').keys()
  assert left_out == found.sizes['test'] - len(paths) > 0 and paths


@pytest.mark.parametrize('path, expected', [
    ('1.jpg', '1.jpg'), ('cat/1.jpg', '1.jpg'), ('Train/CAT/1.jpg', '1.jpg'),
    ('train/cat/old/cat/1.jpg', 'old/cat/1.jpg'), ('/photos/test/cat/1.jpg', '1.jpg'),
    ('old/cat/1.jpg', 'old/cat/1.jpg'), ('für/1.jpg', '1.jpg'), ('/photos/new/1.jpg', 'new/1.jpg'),
    ('/elsewhere/cat/1.jpg', '1.jpg'), ('/cat/photos/Test/CAT/a/1.jpg', 'a/1.jpg'),
    ('../elsewhere/cat/a/1.jpg', 'a/1.jpg'), ('/elsewhere/old/1.jpg', '1.jpg'),
])  # fmt: skip
def test_the_folders_of_splits_and_classes_do_not_identify_an_image(path, expected):
  removed = {'train', 'test', 'cat', unicodedata.normalize('NFC', 'für')}
  for form in ('NFC', 'NFD'):
    written = unicodedata.normalize(form, path)
    assert labels.identities([written], pathlib.Path('/photos'), removed) == [expected]


def test_images_outside_the_folder_are_identified_below_their_common_parent():
  paths = ['/disk/new/a/1.jpg', '/disk/new/b/1.jpg', '/disk/new/cat/c/1.jpg', 'a/1.jpg']
  found = labels.identities(paths, pathlib.Path('/photos'), {'cat'})
  assert found == ['a/1.jpg', 'b/1.jpg', 'c/1.jpg', 'a/1.jpg']


@pytest.mark.parametrize('folders', [('cat', 'dog'), ('monday', 'friday')])
def test_absolute_paths_hold_out_the_same_images_wherever_the_images_are(tmp_path, folders):
  names = [f'{folder}/a/{i}.jpg' for folder in folders for i in range(20)]
  (tmp_path / 'lists').mkdir()
  held_out = []
  for place in (tmp_path / 'photos', tmp_path / 'disk' / 'moved'):
    touch(place, names)
    rows = [(str(place / name), ('cat', 'dog')[i // 20]) for i, name in enumerate(names)]
    found = members(opened(tmp_path / 'lists', table(rows)), 'test')
    held_out.append({path.relative_to(place) for path in found})
    # Paths such as ../photos/cat/a/1.jpg lead to the same files.
    near = [(os.path.relpath(path, tmp_path / 'lists'), label) for path, label in rows]
    relative = members(opened(tmp_path / 'lists', table(near)), 'test')
    assert {path.resolve() for path in relative} == {path.resolve() for path in found}
    if folders == ('cat', 'dog'):
      folder = members(sources.open_source(f'folder:{place}', '', (4, 4)), 'test')
      assert found == folder
  assert held_out[0] == held_out[1] and 0 < len(held_out[0]) < 20


def test_training_images_are_recognised_by_their_absolute_paths(tmp_path):
  names = [f'{c}/{c}{i}.jpg' for c in ('cat', 'dog') for i in range(20)]
  for place in ('photos', 'moved'):
    touch(tmp_path / place, names)
  (tmp_path / 'lists').mkdir()
  folder = sources.open_source(f'folder:{tmp_path}/photos', '', (4, 4))
  known = trained.hash_training_files(folder, ['train'], trained.TrainingFiles())
  rows = [(f'{tmp_path}/moved/{name}', name[:3], 'test') for name in names]
  touch(tmp_path / 'lists', ['cat.jpg', 'dog.jpg'])
  rows += [('cat.jpg', 'cat', 'train'), ('dog.jpg', 'dog', 'train')]
  found = opened(tmp_path / 'lists', table(rows, SPLIT))
  kept, left_out = trained.leave_out_trained(found, 'test', known)
  examples = [kept.read(name, range(a, b)) for name, a, b in kept.pieces('test')]
  unseen = {path.name for part in examples for _, path, _ in part}
  assert unseen == {path.name for path in members(folder, 'test')} and unseen
  assert left_out == folder.sizes['train']


def test_whether_an_image_is_held_out_depends_on_its_path_alone(tmp_path):
  touch(tmp_path)
  before = members(opened(tmp_path, table(SINGLE)), 'test')
  relabelled = [(path, label if i % 3 else 'c') for i, (path, label) in enumerate(SINGLE)]
  touch(tmp_path, ['more.jpg'])
  after = members(opened(tmp_path, table([*relabelled[5:][::-1], ('more.jpg', 'a')])), 'test')
  assert {path for path in before if path.name >= '05'} == {
    p for p in after if p.name != 'more.jpg'
  }


def test_an_absolute_path_is_the_same_image(tmp_path):
  touch(tmp_path)
  relative = opened(tmp_path, table(SINGLE))
  absolute = opened(tmp_path, table([(str(tmp_path / path), label) for path, label in SINGLE]))
  assert members(relative, 'test') == members(absolute, 'test')


def test_an_absolute_path_is_the_same_image_if_the_path_of_the_file_is_relative(
  tmp_path, monkeypatch
):
  touch(tmp_path)
  rows = [(str(tmp_path / path), label) for path, label in SINGLE]
  absolute = opened(tmp_path, table([*rows, SINGLE[3]]))
  monkeypatch.chdir(tmp_path.parent)
  relative = sources.open_source(f'labels:{tmp_path.name}/labels.csv', '', (4, 4))
  assert members(relative, 'test') == members(absolute, 'test')
  assert sum(relative.sizes.values()) == len(NAMES)  # the repeated row counts once


def test_the_column_split_divides_the_images(tmp_path):
  touch(tmp_path)
  names = ('train', 'train', 'test', 'val', 'validation')
  rows = [(*row, names[i % 5]) for i, row in enumerate(SINGLE)]
  found = opened(tmp_path, table(rows, SPLIT))
  assert found.sizes == {'train': 16, 'test': 8, 'val': 8, 'validation': 8}
  assert members(found, 'val') == {
    tmp_path / p: 'ab'.index(c) for p, c, split in rows if split == 'val'
  }
  assert not found.warnings
  rows = [(p, c, 'val' if split != 'train' else split) for p, c, split in rows]
  found = opened(tmp_path, table(rows, SPLIT))
  assert (
    found.sizes == {'train': 16, 'test': 24}
    and "so the split 'val' is used for testing" in found.warnings[0]
  )


def test_several_labels_are_multi_hot(tmp_path):
  touch(tmp_path)
  found = opened(tmp_path, table(SEVERAL))
  assert found.multi_label and found.class_names == ('a', 'b', 'c')
  want = {tmp_path / name: ((0,), (1, 2), (), (2,))[i % 4] for i, name in enumerate(NAMES)}
  assert members(found, 'train') | members(found, 'test') == want
  assert found.files['train'].label_N.dtype == np.uint8
  single = opened(tmp_path, table(SINGLE))
  assert not single.multi_label
  converted = source.multi_hot(single)
  assert members(converted, 'test') == {p: (label,) for p, label in members(single, 'test').items()}
  assert converted.files['test'].label_N.tolist() == [
    [label == 0, label == 1] for label in members(single, 'test').values()
  ]


def test_a_changed_label_changes_the_fingerprint(tmp_path):
  touch(tmp_path)
  first = opened(tmp_path, table(SEVERAL)).fingerprint
  assert opened(tmp_path, table(SEVERAL[::-1])).fingerprint == first
  trained_on = [path.name for path in members(opened(tmp_path, table(SEVERAL)), 'train')]
  index = next(i for i in range(1, 40, 4) if f'{i:02}.jpg' in trained_on)
  changed = [(name, 'b' if i == index else label) for i, (name, label) in enumerate(SEVERAL)]
  assert opened(tmp_path, table(changed)).fingerprint != first


def test_jsonl_equals_csv(tmp_path):
  touch(tmp_path)
  rows = [
    {'path': name, 'label': label.split(';') if label and i % 8 < 4 else label}
    for i, (name, label) in enumerate(SEVERAL)
  ]
  text = '\ufeff' + '\n\n'.join(
    json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)
  )
  one, other = opened(tmp_path, text, 'labels.jsonl'), opened(tmp_path, table(SEVERAL))
  assert one.class_names == other.class_names
  assert members(one, 'train') == members(other, 'train')


def test_a_list_in_jsonl_may_hold_names_with_semicolons(tmp_path):
  touch(tmp_path)
  rows = [{'path': name, 'label': ['a;b'] if i % 2 else ['c', 'd']} for i, name in enumerate(NAMES)]
  found = opened(tmp_path, '\n'.join(map(json.dumps, rows)), 'labels.jsonl')
  assert found.class_names == ('a;b', 'c', 'd')


def test_excel_files_and_umlauts_are_read(tmp_path):
  names = [unicodedata.normalize('NFD', name.replace('photos', 'für')) for name in NAMES]
  touch(tmp_path, names)
  labels = ('grün', unicodedata.normalize('NFD', 'grün'), 'weiß, hell')
  rows = [(unicodedata.normalize('NFC', n), f'"{labels[i % 3]}"') for i, n in enumerate(names)]
  found = opened(tmp_path, '\ufeff' + table(rows).replace('\n', '\r\n'))
  assert found.class_names == ('grün', 'weiß, hell')
  assert all(path.exists() for path in members(found, 'train'))


def test_repeated_rows_count_once(tmp_path):
  touch(tmp_path)
  again = [
    ('./' + SEVERAL[1][0], 'c;b'),
    SEVERAL[2],
    (f'{tmp_path}/{SEVERAL[3][0]}', SEVERAL[3][1]),
  ]
  found = opened(tmp_path, table([*SEVERAL, *again]))
  assert sum(found.sizes.values()) == len(NAMES)
  assert found.warnings[0] == (
    f'{tmp_path}/labels.csv: ignored 3 rows that repeat an earlier row: photos/01.jpg (line 42), '
    f'photos/02.jpg (line 43), {tmp_path}/photos/03.jpg (line 44).'
  )


def test_a_label_that_is_given_twice_counts_once(tmp_path):
  touch(tmp_path)
  found = opened(tmp_path, edit('photos/00.jpg,a', 'photos/00.jpg,a;a'))
  assert not found.multi_label


def test_spaces_and_empty_lines_change_nothing(tmp_path):
  touch(tmp_path)
  want = opened(tmp_path, table(SINGLE))
  found = opened(tmp_path, table(SINGLE).replace(',', ' , ').replace('\n', '\n\n'))
  assert found.class_names == want.class_names
  for split in ('train', 'test'):
    assert members(found, split) == members(want, split)


def test_without_their_labels_images_no_longer_have_several(tmp_path):
  touch(tmp_path)
  plain = source.unlabelled(opened(tmp_path, table(SEVERAL)))
  assert (plain.class_names, plain.multi_label, plain.label_shape) == ((), False, ())
  assert set(members(plain, 'train').values()) == {0}
  assert not plain.files['train'].label_N.any() and plain.files['train'].label_N.ndim == 1


def test_the_header_may_have_capitals(tmp_path):
  touch(tmp_path)
  found = opened(tmp_path, edit('path,label', 'Path,Label'))
  assert found.sizes == opened(tmp_path, table(SINGLE)).sizes


def edit(old, new):
  return table(SINGLE).replace(old, new)


@pytest.mark.parametrize('text, message', [
    (table(SINGLE)[11:], "line 1: expected the header path,label.*got 'photos/00.jpg,a'"),
    (b'', 'line 1: expected the header'),
    (table(SINGLE).replace(',', ';'), 'line 1: the columns are separated by semicolons.*commas'),
    (table(SINGLE).replace(',', '\t'), 'line 1: the columns are separated by tabs'),
    (edit('path,label', 'path,class'), "line 1: unknown column 'class'. Valid: path, label, split"),
    (edit('path,label', 'path'), "line 1: the column 'label' is missing"),
    (edit('path,label', 'path,label,label'), "line 1: the column 'label' is given twice"),
    (edit('03.jpg,b', '03.jpg,b,x'), 'line 5: 3 values for the columns path,label'),
    (edit('03.jpg,b', '03.jpg,'), "line 5: column 'label' of 'photos/03.jpg' is empty"),
    (edit('03.jpg,b', '03.jpg,b;'), "line 5: column 'label' has an empty label: 'b;'"),
    (edit('photos/03.jpg,b', ',b'), "line 5: column 'path' is empty"),
    (edit('photos/03.jpg,b', '"photos/03.jpg,b'), 'not a valid CSV file'),
    (edit('photos/03', 'photo/03'), r'1 of 40 images do not exist: photo/03.jpg \(line 5'),
    (edit('photos/03', 'photos\\03'), "Write '/' instead"),
    (edit('photos/03', 'gs://b/03'), "line 5: paths .* must be relative, got 'gs://b/03.jpg'. Set"),
    (edit('photos/03', 'photos/02'), "line 5: 'photos/02.jpg' has label 'b', but line 4 gives 'a'"),
    (table([*((*row, 'train') for row in SINGLE), (*SINGLE[0], 'test')], SPLIT),
     "line 42: 'photos/00.jpg' has split 'test', but line 2 gives 'train'"),
    (edit('b\n', 'a\n'), 'expected at least two classes .* found 1: a'),
    (edit('b\n', '\n'), "column 'label' of .* is empty"),
    ('path,label\n', 'no images are listed'),
    (table(SINGLE).encode('utf-16'), 'line 1: not UTF-8'),
    (table([*SINGLE, ('photos/für.jpg', 'a')]).encode('latin-1'), 'line 42: not UTF-8'),
    (table([(*row, 'tset') for row in SINGLE], SPLIT), "line 2: column 'split': .*mean test"),
    (table([(*row, '') for row in SINGLE], SPLIT), "line 2: column 'split': unknown ''"),
    (table([(*row, 'test') for row in SINGLE], SPLIT), "has no 'train'"),
    (table([(p, c, 'train' if c == 'a' else 'test') for p, c in SINGLE], SPLIT),
     'no training images for class b. List more images of this class, or remove it.$'),
    (table([*SINGLE[:24], (NAMES[24], 'rare')]),
     'no training images for class rare. A hash of the path.*remove it, or add a column'),
    (table(SINGLE[1:3]), 'no test images. A hash.*List more images, or add a column .split. with'),
])  # fmt: skip
def test_mistakes_in_a_csv_file_name_the_line(tmp_path, text, message):
  touch(tmp_path)
  with pytest.raises(ValueError, match=rf'(?s)labels\.csv.*{message}'):
    opened(tmp_path, text)


@pytest.mark.parametrize('line, message', [
    ('{"path": "photos/00.jpg", "label": 3}', "'label' must be a text or a list of texts, got 3"),
    ('{"path": "photos/00.jpg", "label": ["a", null]}', r'must be a text or .*\["a", null\]'),
    ('{"path": ["photos/00.jpg"], "label": "a"}', "'path' must be a text"),
    ('{"path": "photos/00.jpg"}', "column 'label' is missing"),
    ('{"path": "photos/00.jpg", "label": "a", "width": 3}', "unknown column 'width'"),
    ('["photos/00.jpg", "a"]', 'expected an object such as'),
    ('path,label', 'not valid JSON'),
    ('[' * 100_000, 'not valid JSON .*recursion'),
])  # fmt: skip
def test_mistakes_in_a_jsonl_file_name_the_line(tmp_path, line, message):
  touch(tmp_path)
  rows = [json.dumps({'path': name, 'label': label}) for name, label in SINGLE[1:4]]
  with pytest.raises(ValueError, match=rf'labels\.jsonl, line 4: .*{message}'):
    opened(tmp_path, '\n'.join([*rows, line]), 'labels.jsonl')


def test_the_advice_about_missing_images_works_with_a_relative_label_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  touch(tmp_path / 'elsewhere')
  (tmp_path / 'lists').mkdir()
  (tmp_path / 'lists' / 'labels.csv').write_text(table(SINGLE))
  advice = 'set data.dir to the folder at which the paths start.* give its absolute path'
  with pytest.raises(ValueError, match=advice):
    sources.open_source('labels:lists/labels.csv', '', (4, 4))
  spec = f'labels:{tmp_path}/lists/labels.csv'
  assert sum(sources.open_source(spec, 'elsewhere', (4, 4)).sizes.values()) == len(SINGLE)


def test_a_jsonl_file_in_which_only_some_lines_have_a_split_is_refused(tmp_path):
  touch(tmp_path)
  rows = [{'path': name, 'label': label, 'split': 'train'} for name, label in SINGLE]
  del rows[2]['split']
  message = "line 3: 'photos/02.jpg' has no 'split', but line 1 has one. Write .* or in none"
  with pytest.raises(ValueError, match=rf'labels\.jsonl, {message}'):
    opened(tmp_path, '\n'.join(map(json.dumps, rows)), 'labels.jsonl')


def test_a_missing_or_unnamed_file_is_explained(tmp_path):
  touch(tmp_path)
  (tmp_path / 'labels.txt').write_text(table(SINGLE))
  open_it = lambda spec: sources.open_source(spec, str(tmp_path), (4, 4))
  for spec, message in {
    'labels:': 'has no path',
    'labels:none.csv': "no file at .*none.csv'",
    'labels:labels.txt': "unknown '.txt'",
    'labels.csv': 'write labels:labels.csv',
  }.items():
    (tmp_path / 'labels.csv').write_text(table(SINGLE))
    with pytest.raises(ValueError, match=message):
      open_it(spec)
  assert sources.look_up_source('labels:none.csv', str(tmp_path), (4, 4)) is None
  assert sources.look_up_source('labels:labels.csv', str(tmp_path), (4, 4)).sizes['train']


def test_memory_and_stream_give_the_same_batches_of_several_labels(tmp_path):
  touch(tmp_path)
  draw = np.random.RandomState(0)
  for name in NAMES:
    Image.fromarray(draw.randint(0, 256, (4, 4, 3)).astype(np.uint8)).save(
      (tmp_path / name).with_suffix('.png')
    )
  found = opened(tmp_path, table(SEVERAL).replace('.jpg', '.png'))
  sharded = sharding.batch_sharding(devices.make_mesh(8))
  loaded = memory.load_examples(found, 'train', (4, 4))
  streamed = stream.open_stream(found, 'train', size=(4, 4), fit=image.fit_image)
  np.testing.assert_array_equal(loaded.label_N, streamed.label_N)
  assert loaded.label_N.dtype == streamed.label_N.dtype == np.uint8
  ours, theirs = (
    next(batching.train_batches(examples, 8, 0, 0, sharded)) for examples in (loaded, streamed)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert ours['label'].shape == (8, 3)
  names = [about for about, _ in streamed.content()]
  assert any(about.startswith('1,2 ') for about in names)


def test_all_unreadable_images_are_named_at_once(tmp_path):
  touch(tmp_path)
  with pytest.raises(
    image.BadImage, match=r'(?s)train: 3\d of 3\d images are bad.*And .* more\. Rep'
  ):
    memory.load_examples(opened(tmp_path, table(SINGLE)), 'train', (4, 4))


def test_a_renamed_copy_of_the_data_keeps_its_splits(tmp_path):
  touch(tmp_path / 'one')
  before = opened(tmp_path / 'one', table(SINGLE))
  shutil.copytree(tmp_path / 'one', tmp_path / 'two')
  after = opened(tmp_path / 'two', table(SINGLE))
  for split in ('train', 'test'):
    ours, theirs = (dataclasses.asdict(x.files[split]) for x in (before, after))
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours if k != 'top')
  assert isinstance(after.files['train'], Files)
