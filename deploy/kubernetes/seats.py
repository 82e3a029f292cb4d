"""One seat more or fewer for a pool: its `scale` subresource, changed only as it was read."""

from __future__ import annotations

from deploy.kubernetes.api import KubernetesApi, Object
from deploy.kubernetes.errors import ApiBrokenError, ApiUnreachableError, ConflictError
from deploy.kubernetes.objects import Pool


async def add_seats(api: KubernetesApi, pool: Pool, more: int) -> int:
    """Change how many pods the pool shall have, exactly once; returns how many that is now.

    Each try names the version that it read: one that somebody else overtook is refused, and made again from what is
    there now. After a try whose answer was lost it is looked at whether it was done.

    Raises:
        KubernetesError
    """
    wanted: int | None = None
    while True:
        scale = await api.call("get", pool.kind, pool.name, "scale")
        seats = int(scale["spec"].get("replicas", 0))
        if wanted is not None and seats == wanted:
            return seats  # the answer was lost, the change was not
        wanted = max(0, seats + more)
        if wanted == seats:
            return seats
        try:
            await api.call("patch", pool.kind, pool.name, "scale", body=_patch(scale, wanted), repeatable=False)
        except ConflictError:
            wanted = None
        except (ApiUnreachableError, ApiBrokenError):
            continue
        else:
            return wanted


def _patch(scale: Object, replicas: int) -> Object:
    return {
        "metadata": {"resourceVersion": scale["metadata"]["resourceVersion"]},
        "spec": {"replicas": replicas},
    }
