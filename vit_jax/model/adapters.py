"""`ADAPTERS`: small sets of parameters that are trained instead of the model's own.

LoRA (Hu et al. 2021, 2106.09685, Section 4.1) adds a product of two narrow matrices to each kernel
of attention and MLPs: `W + scale A B`. The paper writes alpha / r for `scale`, and r for the rank.

Decisions:
  * The parameters of an adapter are a top-level entry of the model's parameters, with the adapter's
    name. `lora/block_0/mlp/up/a` and `.../b` belong to the kernel `block_0/mlp/up/kernel`.
  * A training step computes `x W + scale (x A) B`. So no gradient of W is computed or stored. All
    other code merges the adapter into the kernels first, and then needs to know nothing about it.
  * A is Gaussian and B is zero, as in the paper. So training starts exactly at the base model.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.model.layers import Dense, matmul

# Layers that LoRA adapts, with the number of axes of the kernel that belong to the inputs.
ADAPTED = {'query': 1, 'key': 1, 'value': 1, 'out': 2, 'gate': 1, 'up': 1, 'down': 1}


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A way to adapt a model by few parameters. Each function also gets the keys of its section.

  Attributes:
    init: `(key, params, **keys)` returns the adapter's initial parameters.
    merge: `(params, added, **keys)` returns the model's parameters with the adapter in them.
    applied: `(added, **keys)` returns a context in which the unmerged model has the same outputs.
  """

  init: Callable[..., dict]
  merge: Callable[..., dict]
  applied: Callable[..., contextlib.AbstractContextManager]


def init_lora(key: jax.Array, params: dict, rank: int, **_) -> dict:
  """Returns A `[*inputs, rank]`, normal with variance 1 / inputs, and B `[rank, *outputs]`, zero.

  Raises:
    ValueError: the rank is larger than a side of a kernel.
  """

  def init(path, kernel):
    inputs, outputs = sides(path[-1], kernel.shape)
    most = min(math.prod(inputs), math.prod(outputs))
    if rank > most:
      raise ValueError(
        f'lora.rank={rank} is larger than a side of the kernel {"/".join(path)} '
        f'({math.prod(inputs)}x{math.prod(outputs)}). Set lora.rank to at most {most}, usually 4 '
        'to 32.'
      )
    own = jax.random.fold_in(key, next(numbers))
    a = jax.random.normal(own, (*inputs, rank)) * math.prod(inputs) ** -0.5
    return {'a': a, 'b': jnp.zeros((rank, *outputs))}

  numbers = iter(range(2**31))
  return over_kernels(init, params)


def merge_lora(params: dict, added: dict, scale: float, **_) -> dict:
  """Returns the parameters with each adapted kernel W replaced by `W + scale A B`, in float32."""

  def merge(tree, factors):
    if 'a' not in factors:
      return tree | {name: merge(tree[name], inner) for name, inner in factors.items()}
    kernel, a, b = tree['kernel'], factors['a'], factors['b']
    rank = a.shape[-1]
    multiply = np.matmul if isinstance(kernel, np.ndarray) else exact_product
    product = multiply(a.reshape(-1, rank), b.reshape(rank, -1)).reshape(kernel.shape)
    return tree | {'kernel': kernel + scale * product}

  return merge(params, added)


def exact_product(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns a matrix product in full float32; accelerators otherwise round the inputs."""
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


@contextlib.contextmanager
def applied_lora(added: dict, scale: float, **_) -> Iterator[None]:
  """Adds `scale (x A) B` to the output of each adapted layer that runs in the context."""

  def add(call, args, kwargs, context):
    y, module = call(*args, **kwargs), context.module
    called = isinstance(module, Dense) and context.method_name == '__call__'
    factors = find(added, module.path) if called else None
    if factors is None:
      return y
    (x,), rank = args, factors['a'].shape[-1]
    a, b = (
      factors[name].astype(y.dtype).reshape(shape)
      for name, shape in (('a', (-1, rank)), ('b', (rank, -1)))
    )
    narrow = matmul(x.astype(y.dtype).reshape(-1, a.shape[0]), a)
    return y + scale * matmul(narrow, b).reshape(y.shape)

  with nn.intercept_methods(add):
    yield


def sides(layer: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the input axes and the output axes of an adapted layer's kernel."""
  return shape[: ADAPTED[layer]], shape[ADAPTED[layer] :]


def over_kernels(function: Callable, tree: dict, path: tuple[str, ...] = ()) -> dict:
  """Returns a tree with `function(path, kernel)` for each adapted layer, and nothing else."""
  found = {}
  for name, inner in sorted(tree.items()):  # the draws must not depend on the order
    if not isinstance(inner, dict):
      continue
    if name in ADAPTED and 'kernel' in inner:
      found[name] = function((*path, name), inner['kernel'])
    elif below := over_kernels(function, inner, (*path, name)):
      found[name] = below
  return found


def find(tree: dict, path: tuple[str, ...]) -> dict | None:
  """Returns the entry of a tree at a path; None if the tree lacks it."""
  for name in path:
    if name not in tree:
      return None
    tree = tree[name]
  return tree


# By the value of the config key `adapt`, which is also the section of the adapter's own keys.
ADAPTERS = {'lora': Adapter(init_lora, merge_lora, applied_lora)}


Settings = Mapping[str, Mapping[str, object]]  # the keys of each adapter, by its name: a config


def adapted(params: dict, key: jax.Array, adapt: str, settings: Settings) -> dict:
  """Adds the initial parameters of the adapter `adapt`; an empty name adds nothing."""
  if not adapt:
    return params
  return params | {adapt: ADAPTERS[adapt].init(key, params, **settings.get(adapt, {}))}


def merged(params: dict, settings: Settings) -> dict:
  """Returns the parameters of the model alone, after merging an adapter if there is one."""
  for name in own_entries(params):
    own = {other: leaves for other, leaves in params.items() if other != name}
    params = ADAPTERS[name].merge(own, params[name], **settings.get(name, {}))
  return params


@contextlib.contextmanager
def applied(params: dict, settings: Settings) -> Iterator[None]:
  """Context in which the model applies the adapters; its outputs are those of merged parameters."""
  with contextlib.ExitStack() as stack:
    for name in own_entries(params):
      stack.enter_context(ADAPTERS[name].applied(params[name], **settings.get(name, {})))
    yield


def own_entries(params: dict) -> list[str]:
  """Returns the names of the adapters whose parameters are among `params`."""
  return [name for name in ADAPTERS if name in params]


def check_adapter(
  model: nn.Module, image_shape: tuple[int, int, int], adapt: str, settings: Settings
) -> None:
  """Raises ValueError if a model for images `(H, W, C)` cannot have the adapter `adapt`."""
  key, image_BHWC = jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = jax.eval_shape(model.clone(depth=1).init, key, image_BHWC)['params']
  jax.eval_shape(lambda params: adapted(params, key, adapt, settings), shapes)
