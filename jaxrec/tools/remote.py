"""What asking an endpoint takes, whatever it serves: a key, and patience of the length that it asks for."""

import email.utils
import math
import os
import time


def read_key(variable: str, host: str) -> str:
    """The key of a host from an environment variable. Raises ValueError, which never shows it, where it is missing or
    no header can carry it."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"the key of {host} is not there, {variable} is not set: set the environment variable {variable}, name "
            "another one (key_env), or none for an endpoint without a key"
        )
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {variable} holds characters that no header can carry")
    return key


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date (RFC 9110); None for anything else."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
