"""Checks meshes of devices that are not here: descriptions of GPUs and TPUs replace them."""

import itertools
import types

import pytest

from vit_jax.distributed import devices


def describe(platform, kind, place, **more):
  """Returns the description of a device; `place` holds its number, its host and its slice."""
  number, host, slice_ = place
  return types.SimpleNamespace(
    platform=platform, device_kind=kind, id=number, process_index=host, slice_index=slice_, **more
  )


def make_gpus(hosts):
  """Returns eight GPUs for each host. XLA counts each host as a slice."""
  numbers = range(8 * hosts)
  return [describe('gpu', 'NVIDIA H200', (n, n // 8, n // 8)) for n in numbers]


def make_tpus(kind, shape, slices=1):
  """Returns the chips of slices whose chips have the coordinates of a box with this shape."""
  places = itertools.product(range(slices), *map(range, reversed(shape)))
  return [
    describe('tpu', kind, (n, n // 4, place[0]), coords=place[:0:-1], core_on_chip=0)
    for n, place in enumerate(places)
  ]


def check_within(mesh, sizes, most):
  """Checks that each part of a mesh with the same index in `data` lies in at most `most` slices."""
  assert mesh.shape == sizes
  assert len({device.id for device in mesh.flat}) == mesh.size
  for part in mesh:
    assert len({device.slice_index for device in part.flat}) <= most


@pytest.mark.parametrize('hosts', [1, 4])
@pytest.mark.parametrize('fsdp, tensor', [(1, 1), (8, 1), (4, 2)])
def test_gpus_of_one_host_share_the_parameters(hosts, fsdp, tensor):
  gpus = make_gpus(hosts)
  sizes = 8 * hosts // (fsdp * tensor), fsdp, tensor
  mesh = devices.arranged(sizes, gpus[::-1])
  check_within(mesh, sizes, 1)
  assert [device.id for device in mesh.flat] == list(range(8 * hosts))


def test_fsdp_over_two_hosts_uses_whole_hosts():
  check_within(devices.arranged((2, 16, 1), make_gpus(4)), (2, 16, 1), 2)


@pytest.mark.parametrize(
  'kind, shape, fsdp',
  [
    ('TPU v4', (4, 4, 4), 8),
    ('TPU v5p', (4, 4, 4), 2),
    ('TPU v5p', (8, 8, 8), 16),
    ('TPU v6 lite', (16, 16, 1), 4),
    ('TPU v6 lite', (4, 4, 1), 2),
    ('TPU v5 lite', (16, 16, 1), 16),
    ('TPU v5 lite', (2, 2, 1), 1),
  ],
)
def test_any_fsdp_that_divides_a_tpu_slice_forms_a_mesh(kind, shape, fsdp):
  tpus = make_tpus(kind, shape)
  check_within(
    devices.arranged((len(tpus) // fsdp, fsdp, 1), tpus), (len(tpus) // fsdp, fsdp, 1), 1
  )


@pytest.mark.parametrize('sizes', [(64, 1, 1), (4, 16, 1), (8, 4, 2)])
def test_fsdp_and_tensor_stay_inside_a_tpu_slice(sizes):
  mesh = devices.arranged(sizes, make_tpus('TPU v5 lite', (4, 4, 1), slices=4))
  check_within(mesh, sizes, 1)
  assert [part.flat[0].slice_index for part in mesh] == sorted(list(range(4)) * (sizes[0] // 4))


def test_fsdp_over_several_tpu_slices_is_refused():
  tpus = make_tpus('TPU v5 lite', (4, 4, 1), slices=4)
  with pytest.raises(ValueError, match='4 TPU slices.* Choose a mesh.data that is a multiple of 4'):
    devices.arranged((2, 32, 1), tpus)
