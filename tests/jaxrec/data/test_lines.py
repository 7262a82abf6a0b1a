"""Lines of JSON, and the one that a killed process left unfinished."""

import pytest

from jaxrec.data.lines import cut_torn_line, json_lines


def test_objects_with_their_places(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "\u2028é"}\n\n{"b": 2}\n', encoding="utf-8")
    assert json_lines(path) == [(f"{path}:1", {"a": "\u2028é"}), (f"{path}:3", {"b": 2})]
    for line, message in (("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "an object was expected")):
        path.write_text("{}\n" + line)
        with pytest.raises(ValueError, match=rf"x\.jsonl:2: {message}"):
            json_lines(path)


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", b""), (b"a\n", b"a\n"), (b"a\nb", b"a\n"), (b"a", b""), (b"a\n\n", b"a\n\n"),
        (b"a\n" + b"x" * 10_000, b"a\n"), (b"x" * 4096, b""), (b"a\n" + b"x" * 4096, b"a\n"),
    ],
)  # fmt: skip
def test_a_torn_line_is_cut_off(tmp_path, content, kept):
    path = tmp_path / "x"
    path.write_bytes(content)
    for torn in (int(content != kept), 0):
        with open(path, "r+b") as file:
            assert cut_torn_line(file) == torn
        assert path.read_bytes() == kept
