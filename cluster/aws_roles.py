"""Make the two instance profiles of `ray_cluster.yaml`: machines enter S3 and EC2 by what they are, without keys.

`python cluster/aws_roles.py BUCKET [BUCKET ...]`, once an account, with your own credentials. A worker may read and
write those buckets and no more; the head may also start and end machines, and give them the worker's profile. Spot's
own role is made, too: an account that never asked for a spot machine has none, and the head could not make it.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import boto3
from botocore.exceptions import ClientError

HEAD, WORKER = "transfgu-head", "transfgu-worker"
_TRUST = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}


def buckets_policy(buckets: list[str]) -> list[dict[str, Any]]:
    """Statements by which a machine may use the buckets."""
    arns = [f"arn:aws:s3:::{bucket}" for bucket in buckets]
    return [
        {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": arns},
        {
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
            "Resource": [f"{arn}/*" for arn in arns],
        },
    ]


def autoscaler_policy(account: str) -> list[dict[str, Any]]:
    """Statements by which the head may start and end machines of this cluster."""
    return [
        {
            "Effect": "Allow",
            "Action": ["ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags", "ssm:GetParameters"],
            "Resource": "*",
        },
        {
            "Effect": "Allow",
            "Action": ["ec2:TerminateInstances", "ec2:StopInstances", "ec2:StartInstances", "ec2:DeleteTags"],
            "Resource": "*",
            "Condition": {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "transfgu"}},
        },
        {
            "Effect": "Allow",
            "Action": ["iam:PassRole", "iam:GetInstanceProfile"],
            "Resource": [f"arn:aws:iam::{account}:role/{WORKER}", f"arn:aws:iam::{account}:instance-profile/*"],
        },
    ]


def make(buckets: list[str]) -> None:
    """Make both profiles, or bring those that are there up to date."""
    iam, account = boto3.client("iam"), boto3.client("sts").get_caller_identity()["Account"]
    own = buckets_policy(buckets)
    _unless_there(iam.create_service_linked_role, AWSServiceName="spot.amazonaws.com")
    for name, statements in ((WORKER, own), (HEAD, own + autoscaler_policy(account))):
        # Each by itself: an attempt that was stopped between them is gone on with.
        _unless_there(iam.create_role, RoleName=name, AssumeRolePolicyDocument=_document([_TRUST]))
        _unless_there(iam.create_instance_profile, InstanceProfileName=name)
        if not iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]:
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        iam.put_role_policy(RoleName=name, PolicyName="transfgu", PolicyDocument=_document(statements))
        print(f"instance profile {name}: {', '.join(buckets)}")


def _unless_there(make: Callable[..., Any], **what: str) -> None:
    try:
        make(**what)
    except ClientError as error:
        # The latter is what is said of a service's own role.
        if error.response["Error"]["Code"] != "EntityAlreadyExists" and "has been taken" not in str(error):
            raise


def _document(statements: list[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("which buckets may the machines use? python cluster/aws_roles.py BUCKET [BUCKET ...]")
    make(sys.argv[1:])
