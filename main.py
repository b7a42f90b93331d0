"""Runs the modes of vit_jax; `python main.py --help` lists them."""

from vit_jax.cli import start

if __name__ == '__main__':
  start()
