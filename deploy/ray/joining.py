"""Joining a Ray cluster: this process becomes one of its drivers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from deploy.ray.places import NAMESPACE
from slipstream import telemetry
from slipstream.errors import ConfigError, StartupError

log = telemetry.get_logger(__name__)

RAY_CLIENT_SCHEME = "ray://"


@contextmanager
def joined(address: str | None, *, start: bool = True) -> Iterator[None]:
    """A driver of the Ray cluster while the block runs.

    Args:
        address: host:port of its head; the cluster that runs on this machine when absent.
        start: start one on this machine where none is running, for as long as the block runs.

    Raises:
        StartupError: there is none, or it cannot be joined.
        ConfigError: the address is one of Ray's client, which this cannot go through.
    """
    try:
        import ray
    except ImportError:
        message = "Ray is not installed: pip install 'slipstream[ray]', here and on all nodes of the Ray cluster"
        raise StartupError(message) from None
    if address is not None and address.startswith(RAY_CLIENT_SCHEME):
        raise ConfigError(
            f"ray.address = {address}: give host:port of the cluster's head (as `ray start` prints it), and run this "
            "on one of its nodes; Ray's client is not supported",
            param="ray.address",
        )
    init = partial(ray.init, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    try:
        try:
            init(address=address or "auto")
        except ConnectionError:
            if address is not None or not start:
                raise
            log.info("ray_starting")
            init(address="local", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = address or "on this machine"
        raise StartupError(f"ray.address: the Ray cluster {where} cannot be joined: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()
