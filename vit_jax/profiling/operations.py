"""Reads the operations of a compiled program from its HLO text, and sorts them into `KINDS`."""

from collections.abc import Callable
import dataclasses
import re

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
CONTAINERS = ('while', 'call', 'conditional')  # operations that only run other operations
PRODUCTS = ('dot', 'convolution')
LIBRARY_PRODUCTS = ('gemm', 'matmul', 'conv')  # parts of the names of library calls

# Matches the paths of attention operations, except operations in the layers for queries, keys,
# values and output.
ATTENTION = re.compile(r'/attention/(?!(?:query|key|value|out)/)')

# Parts of an operation's path that labels omit: the outermost modules, JAX's control flow, and
# JAX's transformations.
AROUND_MODULES = re.compile(
  r'^(?:shard_map|while|body|cond|closed_call|checkpoint|rematted_computation|ViT|Encoder_0|'
  r'branch_\d+_fun|jit\(.*|vmap\(.*)?$'
)


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of a compiled program.

  Attributes:
    opcode: HLO opcode, e.g. `fusion`.
    inside: opcodes of the operations that a fusion contains.
    call: name of the library function that a custom call runs; empty for all other operations.
    path: names of the modules and of the JAX primitive, e.g.
      `jit(train_step)/jvp(ViT)/block_0/mlp/up/dot_general`.
  """

  opcode: str
  inside: frozenset[str]
  call: str
  path: str

  @property
  def multiplies(self) -> bool:
    """Whether the operation is a matrix product or a convolution, or contains one."""
    own = {self.opcode, *self.inside}.intersection(PRODUCTS)
    return bool(own) or any(part in self.call.lower() for part in LIBRARY_PRODUCTS)

  @property
  def label(self) -> str:
    """Short name, without the block's number, e.g. `block_*/mlp/up/dot_general, backward`."""
    parts = [unwrapped(part) for part in self.path.split('/')]
    kept = [re.sub(r'_\d+$', '_*', part) for part in parts if not AROUND_MODULES.match(part)]
    return '/'.join(kept or [self.opcode]) + (', backward' if 'transpose(' in self.path else '')


KINDS: dict[str, Callable[[Operation], bool]] = {  # an operation has the first kind that matches
  'collectives': lambda op: op.opcode.startswith(COLLECTIVES),
  'attention': lambda op: 'fmha' in op.call or bool(ATTENTION.search(op.path)),
  'matrix products': lambda op: op.multiplies,
  'augmentation': lambda op: 'augment' in op.path,
  'optimizer': lambda op: 'optimizer' in op.path,
  'normalisation, elementwise, copies': lambda op: True,
}


def kind_of(operation: Operation) -> str:
  """Returns the kind of an operation, one of `KINDS`."""
  return next(kind for kind, matches in KINDS.items() if matches(operation))


def unwrapped(part: str) -> str:
  """Removes JAX's transformations from a part of a path: `transpose(jvp(mlp))` becomes `mlp`."""
  while found := re.fullmatch(r'(?:jvp|transpose|vmap|remat)\((.*)\)', part):
    part = found[1]
  return part


def operations(text: str) -> dict[str, Operation]:
  """Returns a dict from HLO names, such as `fusion.3`, to the operations of a compiled program.

  Args:
    text: the program, from `jax.stages.Compiled.as_text`.
  """
  opcodes, lines, computation = {}, {}, ''
  for line in text.splitlines():
    if not line.startswith(' '):
      if line.endswith('{'):
        computation = line.removeprefix('ENTRY ').split(' ')[0].lstrip('%')
      continue
    if found := re.match(r'\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z0-9-]*)\(', line):
      lines[found[1]] = found[2], line
      opcodes.setdefault(computation, set()).add(found[2])
  return {name: operation(opcode, line, opcodes) for name, (opcode, line) in lines.items()}


def operation(opcode: str, line: str, opcodes: dict[str, set[str]]) -> Operation:
  """Returns the operation that a line of HLO text describes.

  Args:
    opcode: HLO opcode of the operation.
    line: the line.
    opcodes: `{name of a computation: opcodes of its operations}`.
  """

  def field(pattern):
    found = re.search(pattern, line)
    return found[1] if found else ''

  inside = opcodes.get(field(r'calls=%?([\w.-]+)'), ()) if opcode == 'fusion' else ()
  call = field(r'custom_call_target="([^"]*)"')
  return Operation(opcode, frozenset(inside), call, field(r'op_name="([^"]*)"'))
