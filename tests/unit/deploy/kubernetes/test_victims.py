"""When a seat goes, it is certain beforehand which pod goes with it, or nobody counts on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.kubernetes.objects import Pod, pods_of
from deploy.kubernetes.victims import LEAST_COST, goes_first
from tests.support.kubernetes_controllers import Controllers
from tests.support.kubernetes_objects import Object, Store, set_condition


def pod(name: str, *, ready: bool = True, phase: str = "Running", assigned: bool = True, cost: int = 0) -> Object:
    body: Object = {
        "metadata": {
            "name": name,
            "uid": name,
            "labels": {"a": "b", "pod-template-hash": "1"},
            "annotations": {"controller.kubernetes.io/pod-deletion-cost": str(cost)},
        },
        "spec": {"nodeName": "n"} if assigned else {},
        "status": {"phase": phase},
    }
    set_condition(body, "Ready", ready)
    return body


def read(body: Object) -> Pod:
    (found,) = pods_of([body])
    return found


def test_among_ready_pods_the_one_with_the_lowest_cost_goes() -> None:
    chosen, other = read(pod("chosen")), read(pod("other"))
    assert goes_first(chosen, [chosen, other])
    assert not goes_first(chosen, [chosen, replace(other, deletion_cost=LEAST_COST)]), "who would go is open"


@pytest.mark.parametrize(
    "starting", [pod("s", ready=False), pod("s", phase="Pending", ready=False), pod("s", assigned=False, ready=False)]
)
def test_what_is_starting_goes_before_what_runs(starting: Object) -> None:
    running = read(pod("running"))
    assert not goes_first(running, [running, read(starting)])
    assert goes_first(read(starting), [running, read(starting)])


def test_while_a_deployment_is_updated_nobody_knows() -> None:
    chosen = read(pod("chosen"))
    newer = replace(chosen, uid="newer", labels={"pod-template-hash": "2"})
    assert not goes_first(chosen, [chosen, newer])
    assert goes_first(chosen, [chosen, replace(newer, ending=True)]), "what is ending is no replica any more"


standings = st.tuples(st.booleans(), st.sampled_from(["Pending", "Running"]), st.booleans(), st.integers(-5, 5))


@given(st.lists(standings, min_size=1, max_size=5), st.data())
def test_what_is_certain_happens(others: list[tuple[bool, str, bool, int]], data: st.DataObject) -> None:
    """Whenever it is said that a pod goes first, the controller ends that one and no other."""
    store = Store("serving")
    pods = [
        store.create("pods", pod(str(number), assigned=assigned, phase=phase, ready=ready, cost=cost))
        for number, (assigned, phase, ready, cost) in enumerate(others)
    ]
    chosen = data.draw(st.sampled_from(pods))
    certain = goes_first(read(chosen), pods_of(pods))
    chosen["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"] = str(LEAST_COST)
    spec = {"replicas": len(pods) - 1, "selector": {"matchLabels": {"a": "b"}}}
    store.create("deployments", {"metadata": {"name": "d"}, "spec": spec})
    Controllers(store, room=0).act()
    gone = {one["metadata"]["name"] for one in pods} - set(store.objects["pods"])
    assert len(gone) == 1
    if certain:
        assert gone == {chosen["metadata"]["name"]}
