"""`ray_cluster.yaml` for `ray up`: schema, defaults, and the bootstrap against a mock of EC2 and IAM."""

import argparse
import fnmatch
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import moto
import pytest
import yaml
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.aws import utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)  # file_mounts are relative to where `ray up` is called
    tree: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return tree


@pytest.fixture
def amazon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """AWS in this process's memory."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # for the key pair
    (tmp_path / ".ssh").mkdir()
    utils.resource_cache.cache_clear()
    with moto.mock_aws():
        yield
    utils.resource_cache.cache_clear()


def roles() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aws_roles", ROOT / "cluster" / "aws_roles.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {n: t for n, t in config["available_node_types"].items() if n != config["head_node_type"]}


def test_rays_own_schema_and_defaults(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    for path in prepared["file_mounts"].values():
        assert (ROOT / path).exists(), path
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_workers_are_spot_of_several_kinds_and_none_when_idle(config: dict[str, Any]) -> None:
    for node in workers(config).values():
        assert node["min_workers"] == 0
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert node["node_config"]["IamInstanceProfile"] == {"Name": "transfgu-worker"}
    gpus = [n["node_config"]["InstanceType"] for n in workers(config).values() if "GPU" in n["resources"]]
    cpus = [n["node_config"]["InstanceType"] for n in workers(config).values() if "GPU" not in n["resources"]]
    assert (len(set(gpus)), len(set(cpus))) == (3, 2)
    head = config["available_node_types"]["head"]
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"]  # a head that goes takes the run with it


def test_the_head_tells_the_jobs_what_may_come(config: dict[str, Any]) -> None:
    start = " ".join(config["head_start_ray_commands"])
    found = re.search(r"TRANSFGU_NODES='([^']+)'", start)
    assert found
    for told in json.loads(found[1]):
        kind = {name: told[name] for name in ("CPU", "GPU") if name in told}
        same = [node for node in workers(config).values() if node["resources"] == kind]
        assert same
        assert {node["max_workers"] for node in same} == {told["count"]}
    assert sum(told["count"] for told in json.loads(found[1])) == config["max_workers"]


def test_no_port_is_open_and_no_key_is_in_it(config: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert not re.search(r"AKIA|secret|0\.0\.0\.0", text, re.IGNORECASE)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        started = " ".join(config[commands])
        assert "--object-spilling-directory" in started
        assert "ship_logs.sh s3://my-bucket" in started


@pytest.mark.processes
def test_the_head_makes_a_token_that_workers_get(config: dict[str, Any], tmp_path: Path) -> None:
    prepared = prepare_config(config)
    assert prepared["cluster_synced_files"] == ["~/.ray/auth_token"]
    script = ROOT / "cluster" / "make_token.sh"
    assert f"bash ~/transfgu/cluster/{script.name}" in prepared["head_setup_commands"]
    assert f"bash ~/transfgu/cluster/{script.name}" not in prepared["worker_setup_commands"]
    assert "RAY_AUTH_MODE=token" in (ROOT / "cluster" / "environment.sh").read_text()
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = next(line for line in prepared[commands] if "ray start" in line)
        assert start.startswith("source ~/transfgu/cluster/environment.sh")
    made = []
    for _ in range(2):  # the second one leaves it as it is
        done = subprocess.run(
            ["bash", script], env={**os.environ, "HOME": str(tmp_path)}, check=True, capture_output=True
        )
        assert done.stdout == done.stderr == b""
        file = tmp_path / ".ray" / "auth_token"
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        made.append(file.read_text())
    assert re.fullmatch("[0-9a-f]{64}", made[0])
    assert made[0] == made[1]


@pytest.mark.ray
@pytest.mark.usefixtures("amazon")
def test_bootstrap_and_a_node_of_each_kind(config: dict[str, Any]) -> None:
    roles().make(["my-bucket"], "203.0.113.7/32")
    ec2 = boto3.client("ec2")
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    prepared = prepare_config(config)
    boot = aws.bootstrap_aws(prepared)
    groups = ec2.describe_security_groups()["SecurityGroups"]
    own = next(g for g in groups if g["GroupName"] == "ray-autoscaler-transfgu")
    outside = [
        (r["CidrIp"], rule["FromPort"], rule["ToPort"]) for rule in own["IpPermissions"] for r in rule["IpRanges"]
    ]
    assert outside == [("203.0.113.7/32", 22, 22)]
    assert not [rule for rule in own["IpPermissions"] if rule.get("Ipv6Ranges")]
    (each_other,) = (rule for rule in own["IpPermissions"] if rule["UserIdGroupPairs"])
    assert [pair["GroupId"] for pair in each_other["UserIdGroupPairs"]] == [own["GroupId"]]
    assert Path(boot["auth"]["ssh_private_key"]).stat().st_mode & 0o077 == 0
    provider = AWSNodeProvider(boot["provider"], boot["cluster_name"])
    for name, node in boot["available_node_types"].items():
        settings = node["node_config"]
        assert settings["SecurityGroupIds"] == [own["GroupId"]]
        assert settings["SubnetIds"]
        assert settings["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/")
        # EC2 looks the image up by its parameter's name, which moto does not.
        provider.create_node({**settings, "ImageId": image}, {"ray-node-name": name, "ray-node-kind": "worker"}, 1)
    started = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    kinds = {i["InstanceType"]: i for i in started}
    assert set(kinds) == {t["node_config"]["InstanceType"] for t in config["available_node_types"].values()}
    assert kinds["m6i.xlarge"]["IamInstanceProfile"]["Arn"].endswith("/transfgu-head")
    for kind, instance in kinds.items():
        assert instance.get("InstanceLifecycle") == (None if kind == "m6i.xlarge" else "spot")


@pytest.mark.usefixtures("amazon")
def test_profiles_hold_what_is_needed_and_may_be_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    module = roles()
    module.make(["one"], "203.0.113.7/32")
    module.make(["one", "two"], "198.51.100.0/24")
    iam = boto3.client("iam")
    for name in (module.HEAD, module.WORKER):
        assert [
            r["RoleName"] for r in iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        ] == [name]
    document = json.dumps(iam.get_role_policy(RoleName=module.WORKER, PolicyName="transfgu")["PolicyDocument"])
    assert "arn:aws:s3:::two/*" in document
    assert "ec2:" not in document
    assert "ec2:RunInstances" in json.dumps(
        iam.get_role_policy(RoleName=module.HEAD, PolicyName="transfgu")["PolicyDocument"]
    )
    told = capsys.readouterr().out
    assert "transfgu-worker: one, two" in told
    assert "SSH from 198.51.100.0/24" in told
    (group,) = boto3.client("ec2").describe_security_groups(GroupNames=["ray-autoscaler-transfgu"])["SecurityGroups"]
    assert [r["CidrIp"] for rule in group["IpPermissions"] for r in rule["IpRanges"]] == ["198.51.100.0/24"]
    made = [role["Path"] for role in iam.list_roles()["Roles"]]
    assert made.count("/aws-service-role/spot.amazonaws.com/") == 1


@pytest.mark.usefixtures("amazon")
def test_the_head_may_start_the_types_of_the_cluster_that_is_named() -> None:
    module = roles()
    module.make(["one"], "203.0.113.7/32", ROOT / "ray_cluster_8gpu.yaml")
    found = boto3.client("iam").get_role_policy(RoleName=module.HEAD, PolicyName="transfgu")["PolicyDocument"]
    types = [
        s["Condition"]["StringEquals"]["ec2:InstanceType"] for s in found["Statement"] if "ec2:InstanceType" in str(s)
    ]
    assert types == [["g6.48xlarge", "g6e.48xlarge", "m6i.xlarge", "p5.48xlarge"]]


@pytest.mark.usefixtures("amazon")
def test_profiles_are_completed_where_making_them_was_stopped() -> None:
    module, iam = roles(), boto3.client("iam")
    iam.create_role(RoleName=module.WORKER, AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName=module.HEAD)
    module.make(["one"], "203.0.113.7/32")
    for name in (module.HEAD, module.WORKER):
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        assert [role["RoleName"] for role in profile["Roles"]] == [name]


def allows(statements: list[dict[str, Any]], action: str, resource: str, **context: str) -> bool:
    """Return True if a policy of Allow statements with StringEquals conditions, such as these, allows a request.

    AWS compares actions without case, resources with `*` for any text, and a condition on a key that the request does
    not have is false.
    """

    def listed(value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    keys = {name.replace("__", ":").replace("_SLASH_", "/"): value for name, value in context.items()}
    for statement in statements:
        assert statement["Effect"] == "Allow"
        assert set(statement) <= {"Effect", "Action", "Resource", "Condition"}
        condition = statement.get("Condition", {})
        assert set(condition) <= {"StringEquals"}
        if (
            any(fnmatch.fnmatchcase(action.lower(), a.lower()) for a in listed(statement["Action"]))
            and any(fnmatch.fnmatchcase(resource, r) for r in listed(statement["Resource"]))
            and all(keys.get(key) in listed(value) for key, value in condition.get("StringEquals", {}).items())
        ):
            return True
    return False


def test_the_head_tags_and_ends_machines_of_this_cluster_alone(config: dict[str, Any]) -> None:
    account, region = "123456789012", config["provider"]["region"]
    policy = roles().autoscaler_policy(account, config)
    machine, own = f"arn:aws:ec2:{region}:{account}:instance/i-1", "ec2__ResourceTag_SLASH_ray-cluster-name"
    for action in ("ec2:CreateTags", "ec2:DeleteTags", "ec2:TerminateInstances", "ec2:StopInstances"):
        assert allows(policy, action, machine, **{own: "transfgu"})
        assert not allows(policy, action, machine)
        assert not allows(policy, action, machine, **{own: "another"})
    # A new machine gets its tags with its start; a foreign one can't be given the cluster's tag.
    assert allows(policy, "ec2:CreateTags", machine, ec2__CreateAction="RunInstances")
    assert not allows(policy, "ec2:CreateTags", machine, **{"aws__RequestTag_SLASH_ray-cluster-name": "transfgu"})
    assert not allows(policy, "ec2:CreateTags", machine, ec2__CreateAction="CreateVolume")
    for action in ("ec2:ModifyInstanceAttribute", "ec2:StartInstances", "ec2:CreateImage", "ec2:RequestSpotInstances"):
        assert not allows(policy, action, machine, **{own: "transfgu"})


def test_the_head_starts_machines_of_this_region_these_types_and_amazons_images(config: dict[str, Any]) -> None:
    account, region = "123456789012", config["provider"]["region"]
    policy, tag = roles().autoscaler_policy(account, config), "aws__RequestTag_SLASH_ray-cluster-name"

    def start(kind: str, number: str = "x", where: str = region, owner: str = account, **context: str) -> bool:
        return allows(policy, "ec2:RunInstances", f"arn:aws:ec2:{where}:{owner}:{kind}/{number}", **context)

    for node in config["available_node_types"].values():
        assert start("instance", ec2__InstanceType=node["node_config"]["InstanceType"], **{tag: "transfgu"})
    assert not start("instance", ec2__InstanceType="p5.48xlarge", **{tag: "transfgu"})
    assert not start("instance", ec2__InstanceType="g6.xlarge")
    assert not start("instance", ec2__InstanceType="g6.xlarge", where="eu-west-1", **{tag: "transfgu"})
    assert start("image", owner="", ec2__Owner="amazon")
    assert not start("image", owner="", ec2__Owner="999999999999")
    for kind in ("subnet", "security-group", "network-interface", "volume", "key-pair"):
        assert start(kind)
        assert not start(kind, where="eu-west-1")
    worker, head = (f"arn:aws:iam::{account}:role/transfgu-{name}" for name in ("worker", "head"))
    assert allows(policy, "iam:PassRole", worker, iam__PassedToService="ec2.amazonaws.com")
    assert not allows(policy, "iam:PassRole", worker, iam__PassedToService="lambda.amazonaws.com")
    assert not allows(policy, "iam:PassRole", head, iam__PassedToService="ec2.amazonaws.com")


@pytest.mark.parametrize("network", ["0.0.0.0/0", "::/0", "203.0.113.7/24", "home"])
def test_ssh_is_open_to_a_network_that_the_user_names(network: str) -> None:
    module = roles()
    with pytest.raises(argparse.ArgumentTypeError):
        module.network(network)
    assert module.network("203.0.113.7") == "203.0.113.7/32"
