"""Files of JSON that others wrote: odd states are told, and what is harmless is read."""

import json

import pytest

from qlog.storage import json_lines, strict_json

VALUES = [{"text": "a\u2028b\u0085c\nd"}, [1.5, None], "é"]


def test_what_is_written_is_read():
    """A line separator of Unicode inside of a string does not end a line."""
    text = "".join(map(json_lines.line, VALUES))
    assert text.count("\n") == len(VALUES) and "é" in text
    assert [json.loads(line) for line in json_lines.split(text)] == VALUES
    assert json_lines.loads(text.encode()) == VALUES
    assert json_lines.split("") == []
    assert json_lines.split(text + '{"cut sh')[-1] == '{"cut sh'


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    "content, values",
    [
        (b"", []),
        (b"\n \r\n", []),
        (b"\xef\xbb\xbf1\n", [1]),  # a mark in front
        (b"1\r\n2\r\n\r\n", [1, 2]),
        (b'"\xe2\x80\xa8"\n\n', ["\u2028"]),  # no end of a line
        (b"[" * 100 + b"]" * 100, [json.loads("[" * 100 + "]" * 100)]),
    ],
)
def test_lines_that_can_be_read(content, values):
    assert json_lines.loads(content) == values


@pytest.mark.parametrize(
    "content, message",
    [
        (b"1\n{", "line 2 is not JSON .Expecting"),
        (b"1\n\n[1] 2", "line 3 is not JSON .Extra data"),
        (b"NaN", "line 1 is not JSON .NaN is no JSON value"),
        (b"[" * 100_000, "line 1 has lists or objects more than 100 deep in each other: flatten"),
        (b"[" * 101 + b"]" * 101, "line 1 has lists or objects more than 100 deep"),
        (b'{"a": ' * 500 + b"1" + b"}" * 500, "line 1 has lists or objects more than 100 deep"),
        (b"1" * 6000, "line 1 holds a whole number of over 4,000 digits: write it as a text"),
        ("1".encode("utf-16"), "is UTF-16 and not UTF-8: save it as UTF-8"),
        ("12".encode("utf-16-be"), "is UTF-16 and not UTF-8"),
        (b"\xff", "is not UTF-8"),
        (LFS, "is a pointer of Git LFS and not the file itself: run `git lfs pull`"),
    ],
)
def test_lines_that_cannot_be_read(content, message):
    with pytest.raises(strict_json.Unreadable, match=message) as error:
        json_lines.loads(content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_key_that_is_there_twice():
    assert strict_json.loads(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(strict_json.Unreadable, match="the key 'a' is there twice"):
        strict_json.loads(b'[{"a": 1, "a": 2}]', unique_keys=True)
