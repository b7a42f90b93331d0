"""The ViT implementations that `benchmarks.speed` compares, called contestants.

`CONTESTANTS[name](work, size)` returns a `Program`. `size` is the result of `works.sizes`. PyTorch
must run in a process without JAX, but `works.sizes` imports JAX. `works.sizes` therefore runs
in a separate process.

Every contestant has the same workload: random images that are already on the device, and the same
batch size, model and precision. A training step is the forward pass with the cross-entropy loss,
the backward pass, and one fused update with AdamW. Each contestant runs in its own process, so
contestants do not share threads or memory.
"""

from collections.abc import Callable
import dataclasses
import itertools
import pathlib
import resource
import statistics
import sys
import time

import numpy as np

from benchmarks import works


@dataclasses.dataclass
class Program:
  """A compiled workload of one contestant.

  Attributes:
    run: runs a number of steps and returns when the device has finished them.
    peak_memory: returns the peak memory of the device in bytes; on a CPU, of the process.
    versions: versions of the libraries, and the device.
  """

  run: Callable[[int], None]
  peak_memory: Callable[[], int]
  versions: dict[str, str]


def random_batch(work: works.Work, size: dict) -> tuple[np.ndarray, np.ndarray]:
  """Returns random float32 images `[B, H, W, 3]` and labels."""
  random, pixels = np.random.RandomState(0), size['image_size']
  image_BHWC = random.normal(size=(work.batch_size, pixels, pixels, 3)).astype(np.float32)
  return image_BHWC, random.randint(works.NUM_CLASSES, size=work.batch_size)


def process_memory() -> int:
  """Returns the peak memory of this process in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak


def jax_program(run: Callable[[int], None], mesh=None, **about: str) -> Program:
  """Returns the `Program` of a JAX function that runs on a mesh or on one device.

  `about` is added to its versions.
  """
  import jax

  device = jax.devices()[0]

  def peak_memory():
    stats = device.memory_stats()
    return stats['peak_bytes_in_use'] if stats else process_memory()

  devices = f'{mesh.size if mesh else 1} x {device.device_kind}'
  return Program(run, peak_memory, {'jax': jax.__version__, 'devices': devices} | about)


def vit_jax(work: works.Work, _: dict) -> Program:
  """Returns this project's program: the training step of `main.py` or the step of `predict`."""
  import jax

  from vit_jax import opening
  from vit_jax.data import batching
  from vit_jax.distributed import devices, sharding
  from vit_jax.evaluation import forward
  from vit_jax.training import state, trial
  from vit_jax.training.step import make_train_step

  config = works.settings(work)
  config.augment.pad_crop.padding, config.augment.flip.probability = 0, 0.0
  devices.start_up()
  mesh = devices.make_mesh(work.batch_size)
  exp, training = opening.from_config(config)
  replicated, over_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  batch = next(batching.train_batches(training.train, work.batch_size, 0, 0, over_batch))
  if work.mode == 'inference':
    step = forward.make_inference_step(exp, mesh, forward.probabilities(exp))
    params = jax.device_put(state.init_params(exp.model, exp.image_shape, 0), replicated)

    def run(steps):
      for _ in range(steps):
        out = step(batch['image'], params)
      jax.block_until_ready(out)

    return jax_program(run, mesh)
  exp = trial.prepared(exp, training, mesh, {})  # as in `main.py`, chooses the attention kernel
  step = make_train_step(exp, training, mesh)
  states = [state.init_state(exp, training, mesh)]

  def run(steps):
    for _ in range(steps):
      states[0], metrics = step(states[0], batch)
    jax.block_until_ready((states, metrics))

  return jax_program(run, mesh, attention=exp.model.attention)


def vit_jax_input(work: works.Work, _: dict) -> Program:
  """Returns a program that only prepares batches as in training: gathers and augments images."""
  import jax
  import jax.numpy as jnp

  from vit_jax import opening
  from vit_jax.data import batching
  from vit_jax.distributed import devices, microbatch, sharding

  devices.start_up()
  mesh = devices.make_mesh(work.batch_size)
  exp, training = opening.from_config(works.settings(work))
  batches = batching.train_batches(
    training.train, work.batch_size, 0, 0, sharding.batch_sharding(mesh)
  )
  example_B = jnp.arange(work.batch_size)

  def augmented(part, key):
    return exp.augment(key, part['example'], part['image'])

  parts = exp.training_parts(mesh)
  augment = jax.jit(microbatch.concatenate(augmented, mesh, parts))

  def run(steps):
    for batch in itertools.islice(batches, steps):
      out = augment(batch | {'example': example_B}, jax.random.key(0))
    jax.block_until_ready(out)

  return jax_program(run, mesh)


def plain_linen(work: works.Work, size: dict) -> Program:
  """Returns a jitted step of a model that is built from flax's own layers."""
  import jax
  import optax

  from benchmarks.plain_linen import PlainViT

  image_BHWC, label_B = jax.device_put(random_batch(work, size))
  model = PlainViT(**size, dtype=work.dtype)
  params = jax.jit(model.init)(jax.random.key(0), image_BHWC)
  if work.mode == 'inference':
    forward = jax.jit(model.apply)

    def run(steps):
      for _ in range(steps):
        out = forward(params, image_BHWC)
      jax.block_until_ready(out)

    return jax_program(run)
  optimizer = optax.adamw(works.LEARNING_RATE)

  def train_step(state, image_BHWC, label_B):
    def loss(params):
      logits_BL = model.apply(params, image_BHWC)
      return optax.softmax_cross_entropy_with_integer_labels(logits_BL, label_B).mean()

    params, opt_state = state
    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  step, states = jax.jit(train_step, donate_argnums=0), [(params, optimizer.init(params))]

  def run(steps):
    for _ in range(steps):
      states[0] = step(states[0], image_BHWC, label_B)
    jax.block_until_ready(states)

  return jax_program(run)


def torch_program(
  work: works.Work, size: dict, model, logits: Callable, versions: dict[str, str]
) -> Program:
  """Returns the program of a PyTorch model; `logits` maps images to logits."""
  import torch
  from torch.nn import functional

  device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
  half = work.dtype == 'bfloat16'
  torch.set_float32_matmul_precision('highest')
  model.to(device)
  image_BHWC, label_B = random_batch(work, size)
  image_BCHW = torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy()).to(device)
  label_B = torch.from_numpy(label_B).to(device)

  def synchronize():
    if device.type == 'cuda':
      torch.cuda.synchronize()

  def infer(steps):
    with torch.inference_mode():
      for _ in range(steps):
        logits(image_BCHW)
    synchronize()

  def train(steps):
    for _ in range(steps):
      with torch.autocast(device.type, torch.bfloat16, enabled=half):
        loss = functional.cross_entropy(logits(image_BCHW).float(), label_B)
      loss.backward()
      optimizer.step()
      optimizer.zero_grad()
    synchronize()

  if work.mode == 'inference':
    model.eval()
    if half:  # as usual in PyTorch, the weights are also converted to bfloat16
      model.bfloat16()
      image_BCHW = image_BCHW.bfloat16()
  else:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), works.LEARNING_RATE, fused=True)
  cuda = device.type == 'cuda'
  peak_memory = torch.cuda.max_memory_allocated if cuda else process_memory
  run = infer if work.mode == 'inference' else train
  versions = versions | {'torch': torch.__version__, 'threads': str(torch.get_num_threads())}
  return Program(run, peak_memory, versions)


def torch_twin(work: works.Work, size: dict, compiled: bool) -> Program:
  """Returns the program of the hand-written PyTorch model."""
  import torch

  from benchmarks.torch_vit import TorchViT

  model = TorchViT(**size)
  return torch_program(work, size, model, torch.compile(model) if compiled else model, {})


def huggingface(work: works.Work, size: dict, compiled: bool) -> Program:
  """Returns a step of `ViTForImageClassification` with PyTorch's fused attention."""
  import torch
  import transformers

  config = transformers.ViTConfig(
    hidden_size=size['width'],
    num_hidden_layers=size['depth'],
    num_attention_heads=size['num_heads'],
    intermediate_size=size['mlp_dim'],
    hidden_act={'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh'}[size['activation']],
    image_size=size['image_size'],
    patch_size=size['patch_size'],
    num_labels=size['num_classes'],
    attn_implementation='sdpa',
  )
  model = transformers.ViTForImageClassification(config)
  forward = torch.compile(model) if compiled else model
  logits = lambda image_BCHW: forward(pixel_values=image_BCHW).logits
  return torch_program(work, size, model, logits, {'transformers': transformers.__version__})


def timm_compiled(work: works.Work, size: dict) -> Program:
  """Returns the program of timm's `VisionTransformer` under `torch.compile`."""
  import timm
  from timm.models.vision_transformer import VisionTransformer
  import torch

  model = VisionTransformer(
    img_size=size['image_size'],
    patch_size=size['patch_size'],
    embed_dim=size['width'],
    depth=size['depth'],
    num_heads=size['num_heads'],
    mlp_ratio=size['mlp_dim'] / size['width'],
    num_classes=size['num_classes'],
    class_token=size['pool'] == 'cls',
    global_pool='token' if size['pool'] == 'cls' else 'avg',
    fc_norm=False,
    act_layer=size['activation'],
  )
  return torch_program(work, size, model, torch.compile(model), {'timm': timm.__version__})


CONTESTANTS = {
  'vit_jax': vit_jax,
  'vit_jax_input': vit_jax_input,
  'plain_linen': plain_linen,
  'torch_eager': lambda work, size: torch_twin(work, size, compiled=False),
  'torch_compiled': lambda work, size: torch_twin(work, size, compiled=True),
  'huggingface_eager': lambda work, size: huggingface(work, size, compiled=False),
  'huggingface_compiled': lambda work, size: huggingface(work, size, compiled=True),
  'timm_compiled': timm_compiled,
}


def cpu_has_bfloat16() -> bool:
  """Returns whether the CPU has instructions for bfloat16 products."""
  info = pathlib.Path('/proc/cpuinfo')
  flags = info.read_text(encoding='utf-8').split() if info.exists() else ()
  return bool({'amx_bf16', 'avx512_bf16'}.intersection(flags))


def matmul_rate(library: str) -> float:
  """Returns the median FLOP/s of 20 products of large square matrices.

  The matrices are 2048 x 2048 in float32 on a CPU, and 8192 x 8192 in bfloat16 on a GPU.

  Raises:
    ImportError: the library is not installed.
  """
  size = 2048
  if library == 'jax':
    import jax
    import jax.numpy as jnp

    half = jax.default_backend() != 'cpu'
    size = 8192 if half else size
    matrix = jnp.ones((size, size), jnp.bfloat16 if half else jnp.float32)
    product = jax.jit(jnp.matmul)
    run = lambda: product(matrix, matrix).block_until_ready()
  else:
    import torch

    half = torch.cuda.is_available()
    size = 8192 if half else size
    matrix = torch.ones(size, size)
    matrix = matrix.bfloat16().cuda() if half else matrix

    def run():
      product = matrix @ matrix
      return torch.cuda.synchronize() if half else product

  run()
  return 2 * size**3 / statistics.median(seconds(run) for _ in range(20))


def seconds(run: Callable[[], object]) -> float:
  """Returns how long a call takes, in seconds."""
  began = time.perf_counter()
  run()
  return time.perf_counter() - began


def machine() -> dict[str, str]:
  """Returns the name of the backend and a description of the machine."""
  import jax

  from benchmarks import collect

  return {'backend': jax.default_backend(), 'machine': collect.machine()}
