"""Reading and replacing files: every failure is one line of one class, and nothing is ever half written."""

import json
import os
import stat

import pytest

import files
from errors import UserError, cut, place, shown

BAD_JSON = {
    "torn": "[1, 2",
    "deep": "[" * 100_000,
    "deep and balanced": "[" * 100 + "]" * 100,
    "deep objects": '{"a":' * 100 + "1" + "}" * 100,
    "NaN": '{"a": NaN}',
    "Infinity": '{"a": [-Infinity]}',
    "overflow": '{"a": 1e999}',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "no UTF-8": b'{"a": "\xff"}',
    "empty": "",
    "another kind": "[]",
    "two values": "{} {}",
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_one_short_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        files.read_json(path)
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_brackets_in_strings_are_not_deep():
    text = json.dumps({"a": "[" * 1000, 'b"\\': ["]{" * 1000]})
    assert files.parse_json(text, "here") == json.loads(text)


def test_what_cannot_be_read_is_one_line(tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    (tmp_path / "long").write_bytes(b"x" * 101)
    for path in (tmp_path, tmp_path / "none", "/dev/zero", "/dev/null", tmp_path / "long", "bad\0name"):
        with pytest.raises(UserError, match="^[^\n]*$"):
            files.read_bytes(path, most=100)
    for path in (tmp_path, tmp_path / "none", "/dev/zero", "/dev/null", "bad\0name"):
        with pytest.raises(UserError, match="^[^\n]*$"):
            next(iter(files.Lines(path)))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)

    def fails(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_whole(path, fails)
    assert path.read_text() == "old"
    files.write_whole(link, "new")
    assert path.read_text() == "new" and link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "link"]
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert path.read_text() == "new"


def test_no_output_is_another_path_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("")
    os.link(a, b)
    (tmp_path / "c").symlink_to(tmp_path / "missing")
    for one, other in (("a", a), (a, b), ("x/../missing", "c"), ("missing", tmp_path / "c")):
        with pytest.raises(UserError, match="--out .* is also --in"):
            files.check_apart({"--out": one}, {"--in": other})
    with pytest.raises(UserError, match="--b .* is also --a"):
        files.check_apart({"--a": "new", "--b": "./new"}, {})
    files.check_apart({"--a": "new", "--b": "newer"}, {"--in": a})
    (tmp_path / "out").write_text("")
    (tmp_path / "model.safetensors.index.json").write_text("")
    files.check_apart({"--out": "out"}, {"--checkpoint": tmp_path})
    with pytest.raises(UserError, match="is a file of --checkpoint"):
        files.check_apart({"--out": "model.safetensors.index.json"}, {"--checkpoint": tmp_path})


def test_values_in_errors_are_short_and_harmless():
    for value in ("x" * 1000, "\x1b[2J" * 30, "a\nb", 10**5000, ["y" * 500], "\u202e", "\ud800"):
        for text in (shown(value), cut(str(value)) if not isinstance(value, int) else ""):
            assert len(text) <= 80 and (text.isprintable() or not text) and text.encode() is not None
    assert place("/long" * 100 + "/name.json").endswith("/name.json") and len(place("/long" * 100)) == 80
