"""Explains errors of gcsfs, and distinguishes temporary errors from permanent ones."""


class NoBucket(ValueError):
  """Raised if a bucket cannot be used; the message gives the reason and the remedy."""


class NoAnswer(OSError):
  """Raised if a bucket does not answer in time; the message gives the time limit."""


def why_refused(error: Exception) -> str:
  """Returns the reason why a request to a bucket failed, and the remedy if it is known."""
  code, text = getattr(error, 'code', None), ' '.join(str(error).split())[:200]
  if code == 401 or 'Anonymous caller' in text or 'DefaultCredentialsError' in repr(error):
    return (
      'no valid credentials. Run `gcloud auth application-default login`, or set '
      'GOOGLE_APPLICATION_CREDENTIALS to the file of a service account.'
    )
  if text.startswith('Forbidden') or code == 403:
    return (
      'access is forbidden. Give this account the role Storage Object User, because the program '
      'must read, write, list and delete objects.'
    )
  if isinstance(error, FileNotFoundError) or code == 404:
    return 'there is no such bucket. Check its name.'
  if isinstance(error, NoAnswer):
    return text
  return f'{type(error).__name__}: {text.rstrip(".")}.'


def is_passing(error: Exception) -> bool:
  """Returns whether an error is temporary, so that a repeated request can succeed."""
  if isinstance(error, FileNotFoundError | FileExistsError | ValueError | NoBucket):
    return False
  code = getattr(error, 'code', None)
  if isinstance(code, int) and code < 500:
    return code in (408, 429)
  return not str(error).startswith('Forbidden')
