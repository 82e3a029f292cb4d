"""What can go wrong between a planner and a Kubernetes API server, each with a type of its own.

All are `UnavailableError`s: the planner logs them, counts them, and decides again an interval later.
"""

from __future__ import annotations

from slipstream.errors import UnavailableError


class KubernetesError(UnavailableError):
    """A call to the API server failed; the message names the verb, the resource and the namespace."""

    default_code = "kubernetes_failed"


class ApiUnreachableError(KubernetesError):
    """Nothing came back: no connection, or no answer in time. What was asked may have been done."""

    default_code = "kubernetes_unreachable"


class ApiBrokenError(KubernetesError):
    """The API server failed (5xx), or answered what is no object. What was asked may have been done."""

    default_code = "kubernetes_broken"


class NotAuthenticatedError(KubernetesError):
    """The API server does not know the token or the certificate (401)."""

    default_code = "kubernetes_not_authenticated"


class AccessDeniedError(KubernetesError):
    """A rule is missing in the service account's Role (403)."""

    default_code = "kubernetes_denied"


class ObjectMissingError(KubernetesError):
    """There is no such object, or no such kind of objects (404)."""

    default_code = "kubernetes_missing"


class ConflictError(KubernetesError):
    """Somebody else changed or made the object meanwhile (409). Nothing was done."""

    default_code = "kubernetes_conflict"


class ThrottledError(KubernetesError):
    """The API server asks for patience (429). Nothing was done."""

    default_code = "kubernetes_throttled"


class RefusedError(KubernetesError):
    """The API server takes the request for wrong (400, 422)."""

    default_code = "kubernetes_refused"
