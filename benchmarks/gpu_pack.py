"""Packs what `make gpu` needs on a machine without a network, and unpacks it there.

    python -m benchmarks.gpu_pack cifar10 --python=3.12     # make gpu-pack DATA=cifar10
    python -m benchmarks.gpu_pack --unpack                  # make gpu starts with this command

The first command fills the folder `gpu/`, which git ignores, with at most 64 MiB:
  * `gpu/cifar10.tar.xz`: the image folder `cifar10` (`train/<class>/`, `test/<class>/`);
  * `gpu/wheels/`: the packages of `requirements-gpu.txt`, for Linux on x86-64 and the given version
    of Python.

The second command extracts the images to `runs/gpu/cifar10`, and installs into `runs/gpu/site` the
packages that this Python lacks or has in an unsuitable version. It changes nothing else on the
machine, and needs only the standard library and pip.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

from benchmarks import arguments

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACK = ROOT / 'gpu'
DATA, WHEELS = PACK / 'cifar10.tar.xz', PACK / 'wheels'
WORK = ROOT / 'runs/gpu'
IMAGES, SITE = WORK / 'cifar10', WORK / 'site'
NEEDED = ROOT / 'requirements-gpu.txt'
LIMIT = 64 * 2**20  # bytes
# Names of all usable platforms. Wheels for an older glibc also run with a newer glibc, but pip
# compares the names exactly.
PLATFORMS = [f'manylinux_2_{n}_x86_64' for n in (28, 27, 26, 24, 17, 12, 5)]
PLATFORMS += ['manylinux2014_x86_64', 'manylinux2010_x86_64', 'manylinux1_x86_64']


def pack(folder: pathlib.Path, python: str) -> None:
  """Fills the folder `gpu/` with the packages and the images.

  Raises:
    ValueError: the folder has no train/ and test/, a download fails, or the result is too large.
  """
  for split in ('train', 'test'):
    if not (folder / split).is_dir():
      raise ValueError(f'{folder / split} is not a folder; expected images in {split}/<class>/')
  shutil.rmtree(PACK, ignore_errors=True)
  WHEELS.mkdir(parents=True)
  platforms = [f'--platform={name}' for name in PLATFORMS]
  run_pip(
    'download', '--no-deps', '--only-binary=:all:', '--implementation=cp',
    f'--python-version={python}', *platforms, f'--dest={WHEELS}', f'--requirement={NEEDED}',
  )  # fmt: skip
  with tarfile.open(DATA, 'w:xz') as tar:
    for split in ('train', 'test'):
      for path in sorted((folder / split).rglob('*')):
        if path.is_file():
          tar.add(path, str(path.relative_to(folder)), filter=anonymous)
  sizes = {path.name: path.stat().st_size for path in PACK.rglob('*') if path.is_file()}
  if sum(sizes.values()) > LIMIT:
    largest = max(sizes, key=sizes.get)
    raise ValueError(
      f'{PACK} has {sum(sizes.values()) / 2**20:.1f} MiB, but the limit is {LIMIT >> 20} MiB. The '
      f'largest file is {largest} with {sizes[largest] / 2**20:.1f} MiB'
    )
  print(f'{PACK}: {len(sizes) - 1} wheels and the images, {sum(sizes.values()) / 2**20:.1f} MiB')


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
  """Removes what differs between machines: the owner, the mode and the time."""
  member.uid = member.gid = member.mtime = 0
  member.uname = member.gname = ''
  member.mode = 0o644
  return member


def unpack() -> None:
  """Extracts the images and installs missing packages, unless this has happened before.

  Raises:
    ValueError: a package is missing and not in `gpu/wheels`.
  """
  if DATA.exists() and not IMAGES.exists():
    partial = emptied(IMAGES)
    with tarfile.open(DATA) as tar:
      tar.extractall(partial, filter='data')
    partial.rename(IMAGES)
  if WHEELS.exists() and not SITE.exists():
    partial, wheels = emptied(SITE), missing()
    if wheels:
      run_pip('install', '--no-index', '--no-deps', f'--target={partial}', *wheels)
    partial.rename(SITE)
    print(f'{SITE}: installed {len(wheels)} packages', flush=True)


def emptied(path: pathlib.Path) -> pathlib.Path:
  """Returns an empty folder next to `path`; the caller fills it, and then renames it to `path`."""
  partial = path.with_name(f'{path.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)  # left by an earlier call that was killed
  partial.mkdir(parents=True)
  return partial


def missing() -> list[str]:
  """Returns the wheels that pip would install for this Python; installs nothing."""
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder) / 'report.json'
    run_pip(
      'install', '--dry-run', '--no-index', f'--find-links={WHEELS}', f'--report={report}',
      f'--requirement={NEEDED}',
    )  # fmt: skip
    found = json.loads(report.read_text(encoding='utf-8'))
  return [item['download_info']['url'] for item in found['install']]


def run_pip(*words: str) -> None:
  """Runs pip.

  Raises:
    ValueError: pip fails; the message is the last error of pip.
  """
  command = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', *words]
  done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.startswith('ERROR')]
    why = (lines or ['it printed no error'])[-1].removeprefix('ERROR: ').rstrip('.')
    raise ValueError(
      f'pip {words[0]} failed: {why}. Install the package, or add it to {NEEDED.name} and run '
      'make gpu-pack again'
    )


def parse(argv: list[str]) -> argparse.Namespace:
  parser = arguments.Parser(__spec__, __doc__)
  parser.add_argument('folder', nargs='?', type=pathlib.Path, help='image folder of CIFAR-10')
  parser.add_argument('--python', default='3.12', help='Python version of the GPU machine')
  parser.add_argument('--unpack', action='store_true', help='extract images and install packages')
  args = parser.parse_args(argv)
  if (args.folder is None) != args.unpack:
    parser.error('expected either an image folder to pack, or --unpack')
  return args


def main(argv: list[str]) -> None:
  args = parse(argv)
  try:
    if args.unpack:
      unpack()
    else:
      pack(args.folder, args.python)
  except ValueError as error:
    arguments.Parser(__spec__, __doc__).error(str(error))


if __name__ == '__main__':
  main(sys.argv[1:])
