"""The stubs that are checked in are what `make proto` would write now."""

from __future__ import annotations

from pathlib import Path

from slipstream.regenerate_stubs import ROOT, generate


def _stubs(root: Path) -> dict[str, str]:
    folder = root / "slipstream" / "v1"
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if "_pb2" in path.name and path.is_file()}


def test_checked_in_stubs_are_those_of_the_proto_files(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh, checked_in = _stubs(tmp_path), _stubs(ROOT)

    assert fresh, "protoc wrote nothing"
    stale = sorted(name for name in fresh.keys() | checked_in.keys() if fresh.get(name) != checked_in.get(name))
    assert stale == [], f"run `make proto`: {', '.join(stale)} are not what the .proto files say"


def test_every_proto_file_has_its_stubs() -> None:
    for proto in (ROOT / "proto" / "slipstream" / "v1").glob("*.proto"):
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            assert (ROOT / "slipstream" / "v1" / f"{proto.stem}{suffix}").is_file()
