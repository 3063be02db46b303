import io
from pathlib import Path

import pytest

from capsnet import files
from capsnet.errors import InputError
from capsnet.files import parse_json, parse_yaml, read_bytes, read_json, read_text, read_up_to, read_yaml


class Endless(io.RawIOBase):
    """A stream of zeros, as a packed file can be, which counts what is taken of it."""

    taken = 0

    def read(self, size: int = -1, /) -> bytes:
        assert size >= 0
        self.taken += size
        return bytes(size)


@pytest.mark.parametrize("most", [0, 1, 2**20 - 1, 2**20, 3 * 2**20 + 1])
def test_of_what_never_ends_no_more_is_taken_than_one_byte_too_many(most: int) -> None:
    stream = Endless()
    with pytest.raises(InputError, match=rf"^zeros must hold at most {most:,} bytes; got more$"):
        read_up_to(stream, most, "zeros")
    assert stream.taken == most + 1
    content = bytes(range(256)) * 2**13
    assert read_up_to(io.BytesIO(content[:most]), most, "zeros") == content[:most]


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^file {tmp_path}/none must be readable; got: No such file or directory$"):
        read_bytes(tmp_path / "none", most=1)
    with pytest.raises(InputError, match=rf"^config file {tmp_path} must be readable; got: Is a directory$"):
        read_text(tmp_path, what="config file")
    (tmp_path / "latin").write_bytes(b"\xe4\xf6")
    with pytest.raises(InputError, match=r"latin must be UTF-8 text; it is not$"):
        read_json(tmp_path / "latin")


def test_text_of_json_and_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": [1, "ä"]}', encoding="utf-8")
    assert read_json(tmp_path / "file") == read_yaml(tmp_path / "file") == {"a": [1, "ä"]}


@pytest.mark.parametrize("text", ["[", "[" * 100_000, "9" * 5000, '{"a" 1}', ""], ids=range(5))
def test_text_that_is_no_json_is_told(text: str) -> None:
    with pytest.raises(InputError, match=r"^here must be JSON; got: [^\n]{5,200}$"):
        parse_json(text, source="here")


@pytest.mark.parametrize(
    "text", ["[", "[" * 10_000, "9" * 5000, "&a [*a]", "a: &a 1\nb: *a", '!!int ""', "!!x 1"], ids=range(7)
)
def test_text_that_is_no_yaml_is_told(text: str) -> None:
    with pytest.raises(InputError, match=r"^here must be YAML; got: [^\n]{5,200}$"):
        parse_yaml(text, source="here")


def test_public_names() -> None:
    assert all(hasattr(files, name) for name in files.__all__)
