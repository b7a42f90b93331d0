"""Finds English that is hard to read: odd phrases and long sentences.

    python tests/prose.py                  # the whole project: counts by folder
    python tests/prose.py README.md -v     # one file, each phrase and long sentence with its line

It reads Markdown, notebooks, docstrings, comments and strings of at least four words. It is an aid
for editors: a text without hits can still be hard to read. `tests/test_docs.py` holds the limits.
"""

import ast
import io
import json
import os
import pathlib
import re
import sys
import tokenize

LONGEST = 25  # words in a sentence
SENTENCE_END = re.compile(r'(?<=[.!?;:])["\')*]*\s+(?=["\'(*\[]*[A-Z0-9])')

PHRASES = {
  'resume': r'\b(?:go|goes|going|went|gone) on\b',
  'default / otherwise': r'\b(?:else|otherwise) (?:it is|they are) (?:that|those)\b',
  'reported / logged': (
    r'\b(?:is|are|was|were|be) said\b|\bsays (?:so|which|why|what)\b|\band said\b'
  ),
  'headless pronoun': r'\b(?:that|those) (?:of|which|that|who|where|it|they)\b',
  'fragment on "of"': (
    r'(?:^|[.;:]\s+|[#"\']\s*)'
    r'(?:Of|of) (?:the|a|an|all|each|what|which|its|this|these)\b'
  ),
  'no X / not available': r'\b(?:is|are|was|be) (?:none|no)\b',
  'besides / next to': r'\bbeside\b',
  'again': r'\banew\b',
  'cannot': r'\bcan not\b',
  'inversion': (
    r'(?:^|[.;:]\s+)(?:Tested|Measured|Kept|Held|Left out|Seen|Drawn|Given|Asked|Said)'
    r' (?:is|are|was|were|for|in)\b'
  ),
  'headless "what"': (
    r'(?:^|[.;:,(]\s*)[Ww]hat (?:is|are|was|it|they|does|did|has|can|a|an|the|follows|comes|that)\b'
  ),
  'whoever / whichever': r'\b(?:whoever|whichever|whatever)\b',
  'as ever, as it is': r'\bas (?:ever|it is|they are|it stands)\b',
  'gave way': r'\b(?:gives?|gave|given) way\b',
  'first process': r'\bthe first process\b',
  'the same (as noun)': r'(?:^|[.;:]\s+|["\']{1,3})The same\b[,.]?',
}
COMPILED = {name: re.compile(pattern, re.M) for name, pattern in PHRASES.items()}


def comments(source):
  """Yields (line, text) of each comment; consecutive lines are one comment."""
  first, last, lines = 0, 0, []
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type != tokenize.COMMENT:
      continue
    alone = not token.line[: token.start[1]].strip()
    if lines and not (alone and token.start[0] == last + 1):
      yield first, '\n'.join(lines)
      lines = []
    if not lines:
      first = token.start[0]
    lines.append(token.string.lstrip('#! '))
    last = token.start[0]
  if lines:
    yield first, '\n'.join(lines)


def strings(source):
  """Yields (line, text) of strings of at least four words; a value in an f-string is one word."""
  inside = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.JoinedStr):
      inside |= {id(value) for value in node.values}
      text = ''.join(v.value if isinstance(v, ast.Constant) else 'X' for v in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
      text = node.value
    else:
      continue
    if text.count(' ') >= 3:
      yield node.lineno, text


def markdown(text):
  """Yields (line, paragraph) outside of code blocks; list items and table cells are paragraphs."""
  code, first, lines = False, 1, []
  for number, line in enumerate([*text.splitlines(), ''], 1):
    fence = line.lstrip().startswith('```')
    starts = not line.strip() or re.match(r'\s*(?:[-*+]|\d+\.|#+|\||!!!|\?\?\?|===|>)\s?', line)
    if (fence or starts) and lines:
      yield first, '\n'.join(lines)
      lines = []
    code ^= fence
    if code or fence or not line.strip():
      continue
    if line.lstrip().startswith('|'):
      yield from ((number, cell.strip()) for cell in line.split('|') if cell.strip())
      continue
    if not lines:
      first = number
    lines.append(line)


def texts(path):
  """Yields (line, text) of every text in a file that is written for people."""
  source = path.read_text()
  if path.suffix == '.py':
    yield from comments(source)
    yield from strings(source)
  elif path.suffix == '.ipynb':
    for cell in json.loads(source)['cells']:
      text = ''.join(cell['source'])
      if cell['cell_type'] == 'markdown':
        yield from markdown(text)
      elif not text.lstrip().startswith(('!', '%')):
        yield from comments(text)
        yield from strings(text)
  else:
    yield from markdown(source)


def sentences(text):
  """Returns the sentences of a text, without code, addresses and formulas."""
  text = re.sub(r'```.*?```|\$\$.*?\$\$', '', text, flags=re.S)
  text = re.sub(r'`[^`\n]+`|\$[^$\n]+\$', 'X', text)
  text = re.sub(r'\]\([^)]*\)', ']', text)
  found = []
  for paragraph in re.split(r'\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.)\s)|\n(?=\s*\w+: )|:\n', text):
    found += SENTENCE_END.split(' '.join(paragraph.split()))
  return [sentence for sentence in found if len(re.findall(r"[A-Za-z][\w'-]*", sentence)) >= 3]


def words(sentence):
  return len([word for word in sentence.split() if re.search(r'\w', word)])


def hits(found):
  """Yields (line, phrase's name, excerpt) of every phrase that readers stumbled over.

  `found` lists the (line, text) pairs of a file.
  """
  for number, text in found:
    for name, pattern in COMPILED.items():
      for match in pattern.finditer(text):
        around = text[max(0, match.start() - 40) : match.end() + 40]
        yield number, name, ' '.join(around.split())


def measure(path):
  """Counts `words` and `sentences` of a file, and lists its `hits` and `long` sentences."""
  found = list(texts(path))
  every = [(number, sentence) for number, text in found for sentence in sentences(text)]
  return {
    'words': sum(len(text.split()) for _, text in found),
    'hits': list(hits(found)),
    'sentences': len(every),
    'long': [(number, sentence) for number, sentence in every if words(sentence) > LONGEST],
  }


def project_files(root='.'):
  """Returns the project's Markdown, notebooks and Python files."""
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name[0] != '.' and name not in ('runs', 'site')]
    found += [pathlib.Path(folder, name) for name in names if name[0] != '.']
  return sorted(path for path in found if path.suffix in ('.py', '.md', '.ipynb'))


def by_group(paths, root='.'):
  """Returns {top-level folder or file: summed counts}; the last entry, 'all', is the total."""
  groups = {}
  for path in paths:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else (path.name,)
    found = measure(path)
    counts = [found['words'], len(found['hits']), found['sentences'], len(found['long'])]
    for group in (parts[0], 'all'):
      groups[group] = [a + b for a, b in zip(groups.get(group, [0] * 4), counts)]
  return {name: groups[name] for name in sorted(groups, key=lambda name: (name == 'all', name))}


def main(arguments):
  paths = [pathlib.Path(a) for a in arguments if a != '-v']
  files = [file for path in paths for file in (project_files(path) if path.is_dir() else [path])]
  files = files if paths else project_files()
  if '-v' in arguments:
    for path in files:
      found = measure(path)
      for number, name, excerpt in found['hits']:
        print(f'{path}:{number}: {name}: ...{excerpt}...')
      for number, sentence in found['long']:
        print(f'{path}:{number}: {words(sentence)} words: {sentence}')
  for name, (n_words, n_hits, n_sentences, n_long) in by_group(files).items():
    rate, share = 1000 * n_hits / max(n_words, 1), 100 * n_long / max(n_sentences, 1)
    print(
      f'{name:20} {n_words:7,} words, {rate:5.1f} hits per 1,000; '
      f'{n_sentences:6,} sentences, {share:5.1f} % above {LONGEST} words'
    )


if __name__ == '__main__':
  main(sys.argv[1:])
