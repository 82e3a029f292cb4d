"""Telling weights apart without reading them all."""

from pathlib import Path

from kv_transfer.model_identity import weights_digest

SIZE = 1 << 20


def a_model(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return folder


def test_the_same_weights_in_two_folders_are_the_same(tmp_path: Path) -> None:
    content = bytes(range(256)) * (SIZE // 256)
    assert weights_digest(a_model(tmp_path / "a", model=content)) == weights_digest(
        a_model(tmp_path / "b", model=content)
    )


def test_a_fine_tune_of_the_same_size_is_another_model(tmp_path: Path) -> None:
    tuned = bytes((value + 1) % 256 for value in bytes(SIZE))
    assert weights_digest(a_model(tmp_path / "a", model=bytes(SIZE))) != weights_digest(
        a_model(tmp_path / "b", model=tuned)
    )


def test_the_last_bytes_count_too(tmp_path: Path) -> None:
    other = bytes(SIZE - 1) + b"x"
    assert weights_digest(a_model(tmp_path / "a", model=bytes(SIZE))) != weights_digest(
        a_model(tmp_path / "b", model=other)
    )


def test_names_and_tiny_files_count(tmp_path: Path) -> None:
    digests = {
        weights_digest(a_model(tmp_path / "a", one=b"", two=b"x")),
        weights_digest(a_model(tmp_path / "b", one=b"x", two=b"")),
        weights_digest(a_model(tmp_path / "c", one=b"x")),
        weights_digest(a_model(tmp_path / "d")),
    }
    assert len(digests) == 4


def test_what_is_not_a_folder_has_no_digest(tmp_path: Path) -> None:
    assert weights_digest(tmp_path / "organisation" / "model") == ""
