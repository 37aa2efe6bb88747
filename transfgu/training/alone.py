"""One worker has nobody to exchange gradients with: without torch's backend its start waits for one import less.

Ray Train's controller opens the backend's configuration, and with PyTorch's it imports torch, before it asks for a
worker; therefore this is a module of its own, which imports nothing of that (see `transfgu.training.controller`).
"""

from ray.train.backend import BackendConfig


class Alone(BackendConfig):
    """In place of `ray.train.torch.TorchConfig`, where there is no process group."""

    backend = "none"
