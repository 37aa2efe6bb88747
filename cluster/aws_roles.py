"""Create what `ray_cluster.yaml` needs in an AWS account: two instance profiles and a security group, without keys.

`python cluster/aws_roles.py BUCKET [BUCKET ...] --ssh-from CIDR`, once per account, with your own credentials. A worker
may only read and write those buckets; the head may also start machines of this cluster's types, image and region, tag
and terminate this cluster's machines, and give them the worker's profile. SSH is open to CIDR only. The role of the
spot service is created, too, because an account that has never requested a spot machine has none, and the head could
not create it.
"""

import argparse
import ipaddress
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import ClientError

HEAD, WORKER = "transfgu-head", "transfgu-worker"
CLUSTER = Path(__file__).resolve().parents[1] / "ray_cluster.yaml"
_TRUST = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}


def buckets_policy(buckets: list[str]) -> list[dict[str, Any]]:
    """Return the statements that let a machine use the buckets."""
    arns = [f"arn:aws:s3:::{bucket}" for bucket in buckets]
    return [
        {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": arns},
        {
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
            "Resource": [f"{arn}/*" for arn in arns],
        },
    ]


def autoscaler_policy(account: str, cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the statements that let the head start, tag and terminate machines of this cluster, and no others.

    Args:
        account: number of the AWS account.
        cluster: content of `ray_cluster.yaml`.
    """
    region, name = cluster["provider"]["region"], cluster["cluster_name"]
    types = sorted({node["node_config"]["InstanceType"] for node in cluster["available_node_types"].values()})
    here = {"StringEquals": {"aws:RequestedRegion": region}}
    own = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": name}}
    ec2 = f"arn:aws:ec2:{region}"
    machines = f"{ec2}:{account}:instance/*"
    used = ("network-interface", "security-group", "subnet", "volume", "key-pair", "spot-instances-request")
    return [
        {"Effect": "Allow", "Action": "ec2:Describe*", "Resource": "*", "Condition": here},
        {
            "Effect": "Allow",
            "Action": "ssm:GetParameters",  # AWS publishes the id of its newest image there
            "Resource": f"arn:aws:ssm:{region}::parameter/aws/service/deeplearning/*",
        },
        {
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": machines,
            "Condition": {"StringEquals": {"ec2:InstanceType": types, "aws:RequestTag/ray-cluster-name": name}},
        },
        {
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": f"{ec2}::image/*",
            "Condition": {"StringEquals": {"ec2:Owner": "amazon"}},
        },
        {
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [f"{ec2}:{account}:{kind}/*" for kind in used],
        },
        {
            "Effect": "Allow",
            "Action": "ec2:CreateTags",
            "Resource": machines,
            "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
        },
        {
            "Effect": "Allow",
            "Action": ["ec2:CreateTags", "ec2:DeleteTags", "ec2:TerminateInstances", "ec2:StopInstances"],
            "Resource": machines,
            "Condition": own,
        },
        {
            "Effect": "Allow",
            "Action": "iam:PassRole",
            "Resource": f"arn:aws:iam::{account}:role/{WORKER}",
            "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        },
        {
            "Effect": "Allow",
            "Action": "iam:GetInstanceProfile",
            "Resource": f"arn:aws:iam::{account}:instance-profile/{WORKER}",
        },
    ]


def make_security_group(cluster: dict[str, Any], ssh_from: str) -> None:
    """Create the security group of the cluster's machines, open to each other and, for SSH, to `ssh_from`.

    It has the name that Ray expects. Without it, Ray would create one with SSH open to the world.

    Raises:
        SystemExit: the region has no default network.
    """
    ec2 = boto3.client("ec2", region_name=cluster["provider"]["region"])
    networks = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not networks:
        sys.exit(f"{cluster['provider']['region']} has no default network: create one with aws ec2 create-default-vpc")
    name, network = f"ray-autoscaler-{cluster['cluster_name']}", networks[0]["VpcId"]
    same = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [network]}]
    found = ec2.describe_security_groups(Filters=same)["SecurityGroups"]
    if found:
        group = found[0]["GroupId"]
        if found[0]["IpPermissions"]:
            ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=found[0]["IpPermissions"])
    else:
        group = ec2.create_security_group(GroupName=name, Description="transfgu on Ray", VpcId=network)["GroupId"]
    each_other = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    family = {"IpRanges": [{"CidrIp": ssh_from}]} if "." in ssh_from else {"Ipv6Ranges": [{"CidrIpv6": ssh_from}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **family}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[each_other, ssh])
    print(f"security group {name}: SSH from {ssh_from}")


def make(buckets: list[str], ssh_from: str, file: Path = CLUSTER) -> None:
    """Create the profiles and the group for the cluster of `file`, or update existing ones."""
    cluster = yaml.safe_load(file.read_text())
    iam, account = boto3.client("iam"), boto3.client("sts").get_caller_identity()["Account"]
    own = buckets_policy(buckets)
    _unless_there(iam.create_service_linked_role, AWSServiceName="spot.amazonaws.com")
    for name, statements in ((WORKER, own), (HEAD, own + autoscaler_policy(account, cluster))):
        # Create each on its own, so that an interrupted attempt can be continued.
        _unless_there(iam.create_role, RoleName=name, AssumeRolePolicyDocument=_document([_TRUST]))
        _unless_there(iam.create_instance_profile, InstanceProfileName=name)
        if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        iam.put_role_policy(RoleName=name, PolicyName="transfgu", PolicyDocument=_document(statements))
        print(f"instance profile {name}: {', '.join(buckets)}")
    make_security_group(cluster, ssh_from)


def _unless_there(make: Callable[..., Any], **what: str) -> None:
    try:
        make(**what)
    except ClientError as error:
        # The second message is that for the role of a service.
        if error.response["Error"]["Code"] != "EntityAlreadyExists" and "has been taken" not in str(error):
            raise


def _document(statements: list[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


def network(text: str) -> str:
    """Return a network in CIDR notation; a single address is one, too.

    Raises:
        argparse.ArgumentTypeError: not a network, or the whole internet.
    """
    try:
        found = ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not found.prefixlen:
        raise argparse.ArgumentTypeError(f"{text} is the whole internet: give your own address, such as 203.0.113.7/32")
    return str(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("buckets", metavar="BUCKET", nargs="+", help="bucket for the machines")
    parser.add_argument("--ssh-from", metavar="CIDR", type=network, required=True, help="who may use SSH")
    parser.add_argument(
        "--cluster", metavar="FILE", type=Path, default=CLUSTER, help="file for `ray up` (ray_cluster.yaml)"
    )
    given = parser.parse_args()
    make(given.buckets, given.ssh_from, given.cluster)
