"""`ADAPTERS`: small sets of parameters that are trained instead of the model's parameters.

LoRA (Hu et al. 2021, 2106.09685, Section 4.1) adds a product of two narrow matrices to each
kernel W of attention and MLPs: `W + scale A B`. The LoRA paper writes alpha / r for `scale`, and r
for the rank of A and B.

Decisions:
  * The parameters of an adapter are part of the model's parameter tree, under a top-level key with
    the adapter's name: `lora/block_0/mlp/up/a` and `.../b` belong to `block_0/mlp/up/kernel`.
  * In a training step, an adapted layer with the input x computes `x W + scale (x A) B`. This form
    needs no gradient of W, so none is computed or stored.
    All other code first merges the adapter into the kernels, and then uses the model alone.
  * A is Gaussian and B is zero, as in the paper, so that training starts exactly at the base model.
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

# Names of the layers that LoRA adapts, each with the number of input axes of the layer's kernel.
ADAPTED = {'query': 1, 'key': 1, 'value': 1, 'out': 2, 'gate': 1, 'up': 1, 'down': 1}


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The functions of one kind of adapter, an entry of `ADAPTERS`.

  `params` are the model's parameters. `added` are the adapter's parameters. `**keys` are the values
  in the config section with the adapter's name: the value of `lora.rank` is passed as `rank`.

  Attributes:
    init: `(key, params, **keys)` returns the adapter's initial parameters. `key` is a random key.
    merge: `(params, added, **keys)` returns the model's parameters, with the adapter merged in.
    applied: `(added, **keys)` returns a context manager. In its context, a model with the unmerged
      `params` computes the same outputs as a model with the merged parameters.
  """

  init: Callable[..., dict]
  merge: Callable[..., dict]
  applied: Callable[..., contextlib.AbstractContextManager]


def init_lora(key: jax.Array, params: dict, rank: int, **_) -> dict:
  """Returns LoRA's initial factors `a` and `b` for every adapted kernel in `params`.

  Let a kernel have the shape `[*inputs, *outputs]`. Then `a`, `[*inputs, rank]`, is drawn from a
  normal distribution with variance 1 / (number of inputs), and `b`, `[rank, *outputs]`, is zero.
  The result is nested like `params`: the path of an adapted layer leads to `{'a': a, 'b': b}`.

  Raises:
    ValueError: the rank is larger than the number of inputs or of outputs of a kernel.
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
  """Returns `params` with each adapted kernel W replaced by `W + scale A B`, in float32.

  `added` holds the factors A and B, as `init_lora` returns them.
  """

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
  """Returns the matrix product of x and y in full float32 precision.

  By default, GPUs and TPUs may round x and y to a lower precision before they multiply.
  """
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


@contextlib.contextmanager
def applied_lora(added: dict, scale: float, **_) -> Iterator[None]:
  """Context manager inside which each adapted layer adds `scale (x A) B` to its output.

  x is the input of the layer. `added` holds the factors A and B, as `init_lora` returns them.
  """

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
  """Splits a kernel shape into (sizes of the input axes, sizes of the output axes).

  `layer` is the name of an adapted layer, a key of `ADAPTED`.
  """
  return shape[: ADAPTED[layer]], shape[ADAPTED[layer] :]


def over_kernels(function: Callable, tree: dict, path: tuple[str, ...] = ()) -> dict:
  """Returns a nested dict with the value of `function(path, kernel)` for each adapted layer.

  Args:
    function: receives the path of the layer, e.g. `('block_0', 'mlp', 'up')`, and its kernel.
    tree: the model's parameters, or the part of them at `path`.
    path: names that lead to `tree`.
  """
  found = {}
  for name, inner in sorted(tree.items()):  # random draws must not depend on the order of the dict
    if not isinstance(inner, dict):
      continue
    if name in ADAPTED and 'kernel' in inner:
      found[name] = function((*path, name), inner['kernel'])
    elif below := over_kernels(function, inner, (*path, name)):
      found[name] = below
  return found


def find(tree: dict, path: tuple[str, ...]) -> dict | None:
  """Returns the entry of a nested dict at a path of names; None if there is no such entry."""
  for name in path:
    if name not in tree:
      return None
    tree = tree[name]
  return tree


# Adapters by name. The name is a value of the config key `adapt`, and the name of a config section.
ADAPTERS = {'lora': Adapter(init_lora, merge_lora, applied_lora)}


# A config, or a dict that maps the name of an adapter to the keys of its config section.
Settings = Mapping[str, Mapping[str, object]]


def adapted(params: dict, key: jax.Array, adapt: str, settings: Settings) -> dict:
  """Returns the model's parameters, with the initial parameters of an adapter added.

  Args:
    params: the model's parameters.
    key: random key of the initial values.
    adapt: name of the adapter, a key of `ADAPTERS`; an empty name adds nothing.
    settings: a config, or a dict such as `{'lora': {'rank': 8, 'scale': 1.0}}`.
  """
  if not adapt:
    return params
  return params | {adapt: ADAPTERS[adapt].init(key, params, **settings.get(adapt, {}))}


def merged(params: dict, settings: Settings) -> dict:
  """Merges all adapters in `params` into the kernels, and returns parameters without adapters."""
  for name in own_entries(params):
    own = {other: leaves for other, leaves in params.items() if other != name}
    params = ADAPTERS[name].merge(own, params[name], **settings.get(name, {}))
  return params


@contextlib.contextmanager
def applied(params: dict, settings: Settings) -> Iterator[None]:
  """Context manager in which the model applies the adapters in `params` without merging them.

  The model's outputs are then the same as with the parameters that `merged` returns.
  """
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
  """Raises ValueError if a model cannot have an adapter, e.g. because `lora.rank` is too large.

  Args:
    model: the model.
    image_shape: (H, W, C) of the model's images.
    adapt: name of the adapter; an empty name stands for no adapter.
    settings: as in `adapted`.
  """
  key, image_BHWC = jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  model = model.clone(depth=1, attention='plain')  # cuDNN is not tested yet
  shapes = jax.eval_shape(model.init, key, image_BHWC)['params']
  jax.eval_shape(lambda params: adapted(params, key, adapt, settings), shapes)
