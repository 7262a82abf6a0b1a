"""Keys from the environment and pauses that a server asks for."""

import email.utils
import time

import pytest

from jaxrec.tools.remote import read_key, retry_after


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("7", 7), (" 2.5 ", 2.5), ("-3", 0), ("nan", None), ("inf", None), ("soon", None), ("", None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)  # fmt: skip
def test_retry_after(value, seconds):
    assert retry_after(value) == seconds


def test_retry_after_a_date():
    assert 2000 < retry_after(email.utils.formatdate(time.time() + 3000, usegmt=True)) <= 3001


def test_keys(monkeypatch):
    monkeypatch.setenv("SOME_KEY", " k-1\n")
    assert read_key("SOME_KEY", "x.org") == "k-1"
    for value in ("k\u00e9y", "k\ny"):
        monkeypatch.setenv("SOME_KEY", value)
        with pytest.raises(ValueError, match="SOME_KEY holds characters that no header") as caught:
            read_key("SOME_KEY", "x.org")
        assert value not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", " ")
    with pytest.raises(ValueError, match=r"key of x\.org is not there, SOME_KEY is not set"):
        read_key("SOME_KEY", "x.org")
