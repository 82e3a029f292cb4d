"""The registry's sets of workers, as commands read them: each wait has a deadline, each failure a remedy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from slipstream.errors import DeadlineError, UnavailableError

if TYPE_CHECKING:
    from slipstream.v1.registry_pb2 import WorkerSet

# The registry sends the set at least once a lease period; the longest lease that can be set is 300 s.
_NEXT_SET_TIMEOUT_S = 330.0


async def worker_sets(address: str, timeout_s: float) -> AsyncGenerator[WorkerSet, None]:
    """The sets as they come, the first within `timeout_s`.

    Raises:
        UnavailableError: no control plane answers there. DeadlineError: it is silent.
    """
    import grpc
    import grpc.aio

    from slipstream.grpc_errors import from_rpc_error
    from slipstream.security.channels import open_channel
    from slipstream.security.diagnosis import why_unreachable
    from slipstream.security.names import ComponentRole
    from slipstream.v1.registry_pb2 import WatchRequest, WorkerSet
    from slipstream.v1.registry_pb2_grpc import RegistryStub

    async with open_channel(address, peer=ComponentRole.CONTROL_PLANE) as channel:
        call = RegistryStub(channel).Watch(WatchRequest())
        wait_s = timeout_s
        try:
            while True:
                async with asyncio.timeout(wait_s):
                    worker_set = await call.read()
                if not isinstance(worker_set, WorkerSet):
                    raise UnavailableError(f"the control plane at {address} ended the connection")
                yield worker_set
                wait_s = _NEXT_SET_TIMEOUT_S
        except TimeoutError:
            raise DeadlineError(f"the control plane at {address} did not answer within {wait_s:g} s") from None
        except grpc.RpcError as error:
            if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE:
                reason = await asyncio.to_thread(why_unreachable, address, ComponentRole.CONTROL_PLANE)
                remedy = "; start a cluster with `slipstream up`, or say where it is with --control-plane HOST:PORT"
                raise UnavailableError(
                    f"no control plane answers at {address} ({error.details()}){reason or remedy}"
                ) from None
            raise from_rpc_error(error) from None
        finally:
            call.cancel()


async def current_set(address: str, timeout_s: float) -> WorkerSet:
    """The workers that there are now; raises what `worker_sets` does."""
    async with aclosing(worker_sets(address, timeout_s)) as sets:
        return await anext(sets)
