"""Peak speeds of accelerators. The metric `mfu` is the speed of training divided by the peak."""

import jax

# Peak speed of dense bfloat16 matrix products in TFLOP/s (10^12 FLOPs per second), from the
# vendors' data sheets; for the TPU v4 lite (TPUv4i) from Jouppi et al. 2021, "Ten Lessons". The
# keys are parts of `device_kind`, and the first matching key counts. So 'NVIDIA H100 PCIe' must
# come before 'NVIDIA H100'.
PEAK_TFLOPS = {
  'NVIDIA A100': 312,
  'NVIDIA H100 PCIe': 756,
  'NVIDIA H100 NVL': 835,
  'NVIDIA H100': 989,
  'NVIDIA GH200': 989,
  'NVIDIA H200 NVL': 835,
  'NVIDIA H200': 989,
  'NVIDIA B200': 2250,
  'TPU v4 lite': 138,
  'TPU v4': 275,
  'TPU v5 lite': 197,
  'TPU v5e': 197,
  'TPU v5': 459,
  'TPU v6': 918,
}


def listed_kind(name: str) -> str | None:
  """Returns the key of `PEAK_TFLOPS` for a device's name; None if the device is not listed.

  A MIG slice is not listed, because it has only a part of the GPU's speed.
  """
  return None if ' MIG ' in name else next((kind for kind in PEAK_TFLOPS if kind in name), None)


def peak_tflops(device: jax.Device) -> float | None:
  """Returns the peak bfloat16 speed of a device in TFLOP/s; None if the device is not listed."""
  return PEAK_TFLOPS.get(listed_kind(device.device_kind))
