"""A line separator of Unicode inside of a string does not end a line."""

import json

from qlog.storage import json_lines

VALUES = [{"text": "a\u2028b\u0085c\nd"}, [1.5, None], "é"]


def test_what_is_written_is_read():
    text = "".join(map(json_lines.line, VALUES))
    assert text.count("\n") == len(VALUES) and "é" in text
    assert [json.loads(line) for line in json_lines.split(text)] == VALUES
    assert json_lines.split("") == []
    assert json_lines.split(text + '{"cut sh')[-1] == '{"cut sh'
