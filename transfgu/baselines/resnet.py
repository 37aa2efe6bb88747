"""Create timm's residual networks for PiCIE and MaskContrast, with any weights and without the classifier."""

from typing import Any

import timm
import torch
from torch import nn

from transfgu.errors import UserError
from transfgu.store import storage
from transfgu.store.weights import read_weights


def residual_network(name: str, weights: str, *, stages: tuple[int, ...], stride: int = 32) -> nn.Module:
    """Return a network that maps (B, 3, H, W) to a list of features, one tensor per entry of `stages`.

    Args:
        name: timm's name, such as `resnet18`.
        weights: "pretrained" (timm's from the hub, trained on ImageNet's labels), "random" (the same at every call), or
            a path or URI of a `.pth` or `.safetensors` file with timm's or torchvision's names, as MoCo has them.
        stages: some of the stages 1 to 4, `res2` to `res5`.
        stride: pixels between neighbours in the last stage; below 32 the last stages are dilated instead.

    Raises:
        UserError: timm has no such network, it does not have four residual stages, or the weights are of another
            network.
    """
    if not timm.is_model(name) or "resnet" not in name:
        raise UserError(
            f"there is no residual network {name!r}: use a ResNet of timm, such as resnet18", code="encoder-unknown"
        )

    def create(pretrained: bool) -> Any:
        return timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=stages, output_stride=stride
        )

    if weights == "pretrained":
        network: nn.Module = create(True)
        return network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create(False)
    if weights != "random":
        _load(network, name, weights)
    return network


def widths(network: Any) -> list[int]:
    """Return the channels of each stage of a `residual_network`."""
    return [int(channels) for channels in network.feature_info.channels()]


def _load(network: nn.Module, name: str, weights: str) -> None:
    tensors = read_weights(weights).tensors
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    other = [key for key in wanted if key in tensors and tensors[key].shape != wanted[key].shape]
    if missing or other:
        which = f"no {missing[0]}" if missing else f"{other[0]} of another shape"
        raise UserError(
            f"weights {storage.shown(weights)} are not those of {name}: there is {which}; name their own network",
            code="weights-misfit",
        )
    network.load_state_dict({key: tensors[key] for key in wanted if key in tensors}, strict=False)
