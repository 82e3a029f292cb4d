"""Regenerates `slipstream/v1/*_pb2*` from `proto/` (the command behind `make proto`).

`generate(destination)` writes the whole set into a folder, so that a test can compare a fresh set with
what is checked in and fail when that is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "proto"


def generate(destination: Path) -> None:
    """Write the stubs for every .proto file below `destination` (as `slipstream/v1/...`).

    Raises:
        RuntimeError: protoc refused a file; its own message is on standard error.
    """
    from grpc_tools import protoc  # type: ignore[import-untyped]  # a development dependency: late, so that the package imports without it

    files = sorted(str(path) for path in PROTO_ROOT.rglob("*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"-I{include}",
            f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}",
            f"--python_out={destination}",
            f"--grpc_python_out={destination}",
            f"--mypy_out=quiet:{destination}",
            f"--mypy_grpc_out=quiet:{destination}",
            *files,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status} on {', '.join(files)}")


if __name__ == "__main__":
    generate(ROOT)
