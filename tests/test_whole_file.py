from __future__ import annotations

from pathlib import Path

import pytest

from fp8train.whole_file import write_whole
from tests.full_disk import files_of_at_most


@pytest.mark.parametrize(
    ("content", "held"), [("\u00fc\n", b"\xc3\xbc\n"), (b"\x00\n", b"\x00\n")], ids=["text", "bytes"]
)
def test_file_is_replaced_and_nothing_lies_beside_it(content: str | bytes, held: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for _ in range(2):
        write_whole(path, content)
        assert path.read_bytes() == held and list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="File too large"), files_of_at_most(10):
        write_whole(path, "x" * 100)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
