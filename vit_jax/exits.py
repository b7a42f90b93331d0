"""Exit codes after errors, in one process and in several."""

from vit_jax.bucket import NoAnswer

TRY_AGAIN = 75  # the same command can succeed later; EX_TEMPFAIL of sysexits.h


class Passing(ValueError):
  """Raised in all processes if a bucket did not answer one of them."""


def exit_code(error: BaseException | None) -> int:
  """Returns the exit code after an error: `TRY_AGAIN` if a bucket did not answer, else 2."""
  while error is not None:
    if isinstance(error, NoAnswer | Passing):
      return TRY_AGAIN
    error = error.__cause__
  return 2


def told(text: str, code: int) -> ValueError:
  """Returns the error to raise in this process after another one failed with this exit code."""
  return Passing(text) if code == TRY_AGAIN else ValueError(text)
