"""Objects as a Kubernetes API server keeps them: versions, merge patches, label selectors, refusals as `Status`."""

from __future__ import annotations

import copy
import itertools
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]


class RefusalError(Exception):
    """An answer that is no object."""

    def __init__(self, code: int, reason: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.headers = code, reason, message, headers or {}

    def status(self) -> Object:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }


@dataclass(slots=True)
class Store:
    """By plural, then by name. One namespace."""

    namespace: str
    objects: dict[str, dict[str, Object]] = field(default_factory=dict)
    _versions: itertools.count[int] = field(default_factory=lambda: itertools.count(1000))

    def all(self, plural: str) -> list[Object]:
        return list(self.objects.setdefault(plural, {}).values())

    def get(self, plural: str, name: str) -> Object:
        try:
            return self.objects.setdefault(plural, {})[name]
        except KeyError:
            raise RefusalError(404, "NotFound", f'{plural} "{name}" not found') from None

    def select(self, plural: str, selector: str) -> list[Object]:
        return [one for one in self.all(plural) if _matches(one["metadata"].get("labels", {}), selector)]

    def create(self, plural: str, body: Mapping[str, Any]) -> Object:
        made = copy.deepcopy(dict(body))
        metadata = made.setdefault("metadata", {})
        if metadata["name"] in self.objects.setdefault(plural, {}):
            raise RefusalError(409, "AlreadyExists", f'{plural} "{metadata["name"]}" already exists')
        metadata |= {"namespace": self.namespace, "uid": str(uuid.uuid4()), "creationTimestamp": now()}
        self.objects[plural][metadata["name"]] = made
        self.touch(made)
        return made

    def touch(self, changed: Object) -> None:
        """It has another version now."""
        changed["metadata"]["resourceVersion"] = str(next(self._versions))

    def patch(self, plural: str, name: str, patch: Mapping[str, Any]) -> Object:
        found = self.get(plural, name)
        self.check(plural, found, patch.get("metadata", {}))
        merge(found, patch)
        self.touch(found)
        return found

    def replace(self, plural: str, name: str, body: Mapping[str, Any]) -> Object:
        found = self.get(plural, name)
        self.check(plural, found, body.get("metadata", {}))
        found["spec"] = copy.deepcopy(body["spec"])
        self.touch(found)
        return found

    def check(self, plural: str, found: Object, given: Mapping[str, Any]) -> None:
        """Whoever names a version, or a uid, means that one."""
        metadata = found["metadata"]
        for name in ("resourceVersion", "uid"):
            if given.get(name) not in (None, metadata[name]):
                raise RefusalError(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {plural} "{metadata["name"]}": the object has been modified; '
                    "please apply your changes to the latest version and try again",
                )


def merge(target: Object, patch: Mapping[str, Any]) -> None:
    """RFC 7386."""
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, Mapping):
            inner = target.setdefault(name, {})
            merge(inner, value)
        else:
            target[name] = value


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(obj: Object, kind: str) -> Object:
    """An object's condition of that kind, made where it has none."""
    conditions = obj.setdefault("status", {}).setdefault("conditions", [])
    for one in conditions:
        if one["type"] == kind:
            found: Object = one
            return found
    conditions.append({"type": kind, "status": "Unknown", "lastTransitionTime": now()})
    made: Object = conditions[-1]
    return made


def set_condition(obj: Object, kind: str, value: bool, **more: str) -> None:
    found = condition(obj, kind)
    if found["status"] != str(value):
        found["lastTransitionTime"] = now()
    found |= {"status": str(value), **more}


def is_ready(pod: Object) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", ()))


def _matches(labels: Mapping[str, str], selector: str) -> bool:
    return all(_fits(labels, one) for one in _terms(selector))


def _terms(selector: str) -> Iterable[str]:
    return [one for one in selector.split(",") if one]


def _fits(labels: Mapping[str, str], term: str) -> bool:
    if any(sign in term for sign in ("!", "(", " ")):
        raise RefusalError(400, "BadRequest", f"this server knows only `key` and `key=value`, not {term!r}")
    key, equals, value = term.replace("==", "=").partition("=")
    return labels.get(key) == value if equals else key in labels
