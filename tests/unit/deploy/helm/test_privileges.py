"""What pods may do: no more than they need, also on fast networks."""

from __future__ import annotations

import pytest

from tests.unit.deploy.helm.chart import CASES, component, container, is_worker, objects, of_kind, pod_templates

CASES_BUT_PRIVILEGED = [case for case in CASES if case != "privileged"]


@pytest.mark.parametrize("case", CASES_BUT_PRIVILEGED)
def test_containers_have_no_privileges(case: str) -> None:
    for _, pod in pod_templates(objects(CASES[case])):
        own, whole = container(pod)["securityContext"], pod["spec"]["securityContext"]
        assert whole["runAsNonRoot"] is True
        assert whole["runAsUser"] > 0
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"]["drop"] == ["ALL"]
        assert "privileged" not in own
        added = own["capabilities"].get("add", [])
        assert added == [] or (added == ["IPC_LOCK"] and is_worker(pod))
        for shared in ("hostNetwork", "hostPID", "hostIPC"):
            assert shared not in pod["spec"]


def test_privileged_is_a_choice_that_the_notes_warn_of() -> None:
    from tests.unit.deploy.helm.chart import texts

    for _, pod in pod_templates(objects(CASES["privileged"])):
        own = container(pod)["securityContext"]
        assert own.get("privileged", False) is is_worker(pod)
        # The API server refuses a privileged container that may not escalate.
        assert "allowPrivilegeEscalation" not in own or not is_worker(pod)
    assert "fabric.privileged is on" in texts(CASES["privileged"])["NOTES.txt"]
    assert "privileged" not in texts(CASES["efa"])["NOTES.txt"]


@pytest.mark.parametrize("case", CASES)
def test_only_a_node_cache_reaches_the_nodes_files(case: str) -> None:
    for _, pod in pod_templates(objects(CASES[case])):
        paths = [volume["name"] for volume in pod["spec"]["volumes"] if "hostPath" in volume]
        assert paths == (["cache"] if case in ("node-cache", "prefetched") and is_worker(pod) else [])


@pytest.mark.parametrize("case", CASES)
def test_no_pod_has_a_token_for_the_api_server_that_it_does_not_use(case: str) -> None:
    rendered = objects(CASES[case])

    assert all(each["automountServiceAccountToken"] is False for each in of_kind(rendered, "ServiceAccount"))
    for _, pod in pod_templates(rendered):
        mounts = pod["spec"]["automountServiceAccountToken"]
        scales = bool(of_kind(rendered, "Role"))
        assert mounts is (scales and component(pod) == "control-plane")
