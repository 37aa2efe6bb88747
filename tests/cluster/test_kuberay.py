"""The manifests against the schemas that a cluster's API server checks."""

import copy
import json
import lzma
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}


def manifest(kind: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "kuberay" / MANIFESTS[kind]).read_text())
    return tree


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lzma.decompress((Path(__file__).parent / "kuberay_crds.json.xz").read_bytes()))
    return found


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {g["groupName"]: g for g in cluster["spec"]["workerGroupSpecs"]}


def containers(tree: Any) -> list[dict[str, Any]]:
    """Return every container of a manifest."""
    if isinstance(tree, dict):
        return [*tree.get("containers", []), *(c for v in tree.values() for c in containers(v))]
    return [c for v in tree for c in containers(v)] if isinstance(tree, list) else []


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_fit_their_schemas(kind: str, schemas: dict[str, Any]) -> None:
    tree = manifest(kind)
    assert (tree["kind"], tree["apiVersion"]) == (kind, "ray.io/v1")
    validator = jsonschema.Draft202012Validator(schemas[kind])
    validator.validate(tree)
    misspelt = copy.deepcopy(tree)
    misspelt["spec"]["idleTimeout"] = 3
    with pytest.raises(jsonschema.ValidationError, match="idleTimeout"):
        validator.validate(misspelt)


def test_groups_start_at_nothing_and_the_head_knows_what_they_may_become() -> None:
    cluster = manifest("RayCluster")
    assert cluster["spec"]["rayVersion"] == ray.__version__
    assert cluster["spec"]["enableInTreeAutoscaling"]
    told = []
    for name in ("gpu", "cpu"):
        group = groups(cluster)[name]
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        row = {"count": group["maxReplicas"], "CPU": int(limits["cpu"])}
        told.append(row | ({"GPU": int(limits["nvidia.com/gpu"])} if "nvidia.com/gpu" in limits else {}))
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert json.loads({e["name"]: e["value"] for e in head["env"]}["TRANSFGU_NODES"]) == told


@pytest.mark.parametrize("kind", MANIFESTS)
def test_nothing_runs_as_root_or_without_limits(kind: str) -> None:
    found = containers(manifest(kind)["spec"])
    assert found
    for container in found:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    text = json.dumps(manifest(kind))
    assert text.count('"runAsNonRoot": true') == (3 if kind == "RayCluster" else 1)


def test_the_job_asks_for_nothing_that_the_operator_refuses_on_a_cluster_that_is_there() -> None:
    job = manifest("RayJob")["spec"]
    # The operator looks at these beyond the schema: what it would run again, and what it would delete, is the cluster.
    assert job.get("backoffLimit", 0) == 0
    assert job.get("shutdownAfterJobFinishes") or not job.get("ttlSecondsAfterFinished")
    assert not job.get("suspend")


def test_the_driver_runs_on_the_head_which_knows_the_nodes() -> None:
    # Ray puts a driver that asks for resources on whichever node has them.
    assert not [name for name in manifest("RayJob")["spec"] if re.match("entrypoint(Num|Resources)", name)]


def test_the_autoscalers_logs_are_kept_with_the_heads() -> None:
    head = manifest("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "ray-logs", "mountPath": "/tmp/ray"} in head["containers"][0]["volumeMounts"]
    assert {"name": "ray-logs", "emptyDir": {}} in head["volumes"]


def test_the_job_runs_on_that_cluster() -> None:
    job = manifest("RayJob")["spec"]
    assert job["clusterSelector"]["ray.io/cluster"] == manifest("RayCluster")["metadata"]["name"]
    script = next(word for word in job["entrypoint"].split() if word.endswith(".py"))
    assert (ROOT / "jobs" / Path(script).name).is_file()
    assert (
        job["submitterPodTemplate"]["spec"]["containers"][0]["image"] == containers(manifest("RayCluster"))[0]["image"]
    )


def test_pods_ask_for_a_token_and_let_in_each_other_and_submitters() -> None:
    cluster, job = manifest("RayCluster"), manifest("RayJob")["spec"]["submitterPodTemplate"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    (container,) = job["spec"]["containers"]
    variables = {e["name"]: e for e in container["env"]}
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    # The operator names the secret after the cluster.
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
        "name": cluster["metadata"]["name"],
        "key": "auth_token",
    }
    policy = yaml.safe_load((ROOT / "cluster" / "kuberay" / "networkpolicy.yaml").read_text())["spec"]
    own = {"ray.io/cluster": cluster["metadata"]["name"]}
    assert policy["podSelector"] == {"matchLabels": own}
    assert policy["policyTypes"] == ["Ingress"]
    each_other, dashboard = policy["ingress"]
    assert each_other == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert dashboard["from"][0] == {"podSelector": {"matchLabels": job["metadata"]["labels"]}}
    assert [peer["podSelector"]["matchLabels"] for peer in dashboard["from"][1:]] == [
        {"app.kubernetes.io/name": "kuberay-operator"}
    ]
    assert [port["port"] for port in dashboard["ports"]] == [8265]
    for tree in (cluster, manifest("RayJob")):
        text = json.dumps(tree)
        assert text.count('"runAsNonRoot": true') == text.count('"seccompProfile": {"type": "RuntimeDefault"}')
