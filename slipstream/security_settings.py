"""The `security` section of `slipstream.settings`: what protects the ways between processes, and to the outside.

What is done with it is in `slipstream.security`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slipstream.api_key_settings import ApiKeySettings


class SecuritySettings(ApiKeySettings):
    """API keys, certificates and tokens: see docs/security/api-keys.md and docs/security/tls.md."""

    tls_folder: Path | None = Field(
        None,
        description="folder made by `slipstream ca init`: each process takes its role's certificate from it, and the "
        "public faces theirs",
    )
    ca_file: Path | None = Field(
        None, description="certificates of the authorities that other components' must come from; with `tls_folder` "
        "its ca.pem"
    )  # fmt: skip
    certificate_file: Path | None = Field(
        None, description="this process' own certificate, with its role in it; with `tls_folder` the one of its role"
    )
    key_file: Path | None = Field(None, description="the key of `certificate_file`")
    cluster_token_file: Path | None = Field(
        None,
        description="file of a secret that all components share, the lighter alternative to certificates: a line for "
        "each token, of which the first is sent and all are accepted",
    )
    allow_insecure: bool = Field(
        False,
        description="let the control plane and workers listen on addresses that other machines reach although neither "
        "certificates nor a token protect them",
    )
    metrics: Literal["mtls", "tls", "plain"] = Field(
        "mtls",
        description="who may read /metrics of workers and control plane where certificates are used: `mtls` who has "
        "one, `tls` everybody, encrypted, `plain` everybody",
    )
    face_certificate_file: Path | None = Field(
        None,
        description="certificate of the public HTTP and gRPC faces, with what it needs between it and its authority; "
        "without one they speak plainly",
    )
    face_key_file: Path | None = Field(None, description="the key of `face_certificate_file`")
    face_client_ca_file: Path | None = Field(
        None, description="authorities of which clients of the public faces need a certificate; none do when absent"
    )
