"""List the methods that a run can train: TransFGU and the methods of comparison.

An entry has the stages of a method, its settings with their published values, and the module with its learner, its
model and its checks before a run. Modules are imported when they are needed, because they import torch.
"""

import difflib
import importlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transfgu.errors import UserError

STAGES = ("samples", "features", "concepts", "pseudo_labels", "training", "evaluation")
"""All stages in their order; a method may leave some out."""

TRANSFGU = "transfgu"

_TRAINED = ("samples", "training", "evaluation")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method."""

    title: str
    """Name of the method in tables."""
    about: str
    """Description of the training for the report, in one sentence."""
    learner: str
    """`module:class`, constructed with a `transfgu.learner.Setting`: a `transfgu.learner.Learner`."""
    model: str
    """`module:function` with recipe, list of weights by name, and device; returns `transfgu.learner.Model` objects."""
    check: str = ""
    """`module:function` with the recipe; it raises UserError if the method can't work. Empty: no check."""
    stages: tuple[str, ...] = _TRAINED
    encoder: bool = False
    """True if the method uses the frozen encoder."""
    fields: tuple[str, ...] = ()
    """Fields and components of the recipe that its training depends on, besides :data:`SHARED`."""
    proposals: tuple[str, ...] = ()
    """Fields that its pseudo labels depend on, if they are not TransFGU's concept maps."""
    anneals: bool = False
    """True if its learning rate depends on the number of epochs, so that more epochs are another training."""
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields that differ from a preset's TransFGU, by preset; those of all presets by ""."""

    @property
    def optimised(self) -> bool:
        """Return True if its training takes optimiser steps."""
        return "training" in self.fields or "training.lr" in self.fields

    def load(self, what: str) -> Any:
        """Import `learner`, `model` or `check`."""
        module, _, name = getattr(self, what).partition(":")
        return getattr(importlib.import_module(module), name)


SHARED = (
    *("seed", "concepts.things", "concepts.stuff"),
    *("dataset.image_size", "dataset.training_size", "dataset.orient", "dataset.max_pixels"),
)
"""Fields that the training of every method depends on."""

OPTIMISED = tuple(
    f"training.{name}"
    for name in (
        *("epochs", "passes", "lr", "batch_size", "lr_scaling", "lr_batch_size", "sampler"),
        *("weight_decay", "evaluate_every"),
    )
)
"""Fields of all methods that take optimiser steps."""

_LIP = ("lip-5", "lip-16", "lip-19")
_ENCODER = ("encoder.name", "encoder.weights", "encoder.precision")

_PICIE_FIELDS = ("backbone", "weights", "width", "init_batches", "start_iterations")
_PICIE: dict[str, Any] = {
    "learner": "transfgu.baselines.picie:PiCIE",
    "model": "transfgu.baselines.picie:load_models",
    "check": "transfgu.baselines.picie:check",
    # train_picie.sh of janghyuncho/PiCIE: res1 320, res2 640, 10 epochs; Cityscapes: train_picie_cityscapes.sh.
    "values": {
        "": {
            "training_size": (640, 640), "epochs": 10, "passes": 1, "lr": 1e-4, "training.batch_size": 128,
            "weight_decay": 0.0,
        },
        "cityscapes": {"training_size": (640, 1280), "lr": 1e-3},
        **{name: {"training_size": (1280, 640)} for name in _LIP},
        "shapes": {
            "training_size": (128, 128), "epochs": 6, "lr": 1e-3, "training.batch_size": 16,
            "picie.backbone": "resnet18", "picie.weights": "random", "picie.auxiliary": 30,
        },
    },
}  # fmt: skip

METHODS: Mapping[str, Method] = types.MappingProxyType(
    {
        TRANSFGU: Method(
            title="TransFGU",
            about="A small decoder learned masks from these maps. Regularly the decoder became the teacher, and a new "
            "decoder learned from the teacher and the maps together, so that masks become sharper.",
            learner="transfgu.training.bootstrapping:Bootstrapping",
            model="transfgu.inference.mask_model:load_models",
            stages=STAGES,
            encoder=True,
            fields=("dataset.training_size", "decoder.depth", "decoder.dropout", "training"),
        ),
        "iic": Method(
            title="IIC",
            about="A convolutional network learned classes that predict the class of the same place in another view as "
            "well as possible.",
            learner="transfgu.baselines.iic:IIC",
            model="transfgu.baselines.iic:load_models",
            fields=(*OPTIMISED, "iic"),
            # Model 512 of xu-ji/IIC's examples/commands.txt (COCO-Stuff-15): 128 x 128, batch 60, lr 1e-4.
            values={
                "": {
                    "training_size": (128, 128), "epochs": 4800, "passes": 1, "lr": 1e-4, "training.batch_size": 60,
                    "weight_decay": 0.0,
                },
                "cityscapes": {"training_size": (128, 256)},
                **{name: {"training_size": (256, 128)} for name in _LIP},
                "shapes": {
                    "training_size": (64, 64), "epochs": 7, "passes": 4, "lr": 1e-3, "training.batch_size": 20,
                    "iic.widths": (8, 16, 32, 32, 64, 64), "iic.half_side": 5,
                },
            },
        ),
        "picie": Method(
            title="PiCIE",
            about="A convolutional network learned pixel features with the same clusters in two colourings and in any "
            "crop; auxiliary over-clustering supports the training.",
            fields=(*OPTIMISED, "picie"),
            **_PICIE,
        ),
        "picie-no-aux": Method(
            title="PiCIE without auxiliary clustering",
            about="A convolutional network learned pixel features with the same clusters in two colourings and in any "
            "crop.",
            fields=(*OPTIMISED, *(f"picie.{name}" for name in _PICIE_FIELDS)),
            **_PICIE,
        ),
        "maskcontrast": Method(
            title="MaskContrast",
            about="A convolutional network learned pixel embeddings that are similar within an object and its views "
            "and different between objects; the objects' means were then grouped into clusters.",
            learner="transfgu.baselines.maskcontrast:MaskContrast",
            model="transfgu.baselines.maskcontrast:load_models",
            check="transfgu.baselines.maskcontrast:check",
            stages=("samples", "pseudo_labels", "training", "evaluation"),
            encoder=True,
            anneals=True,
            fields=(*OPTIMISED, "maskcontrast", "concepts.iterations"),
            proposals=(
                "dataset.image_size", "dataset.interpolation", "dataset.orient", "dataset.max_pixels",
                "windows.saliency_factor",
                "maskcontrast.object_masks", *_ENCODER,
            ),
            # VOCSegmentation_unsupervised_saliency_model.yml: 40 epochs, batch 128, SGD 0.004, views of 224.
            values={
                "": {
                    "training_size": (448, 448), "epochs": 40, "passes": 1, "lr": 4e-3, "training.batch_size": 128,
                    "weight_decay": 1e-4,
                },
                "cityscapes": {"training_size": (448, 896)},
                **{name: {"training_size": (896, 448)} for name in _LIP},
                "shapes": {
                    "training_size": (128, 128), "epochs": 4, "evaluate_every": 2, "training.batch_size": 16,
                    "maskcontrast.backbone": "resnet18", "maskcontrast.weights": "random",
                },
            },
        ),
        "token-kmeans": Method(
            title="K-Means over patch tokens",
            about="The patch tokens of a frozen vision transformer were grouped into clusters.",
            learner="transfgu.baselines.token_kmeans:TokenKMeans",
            model="transfgu.baselines.token_kmeans:load_models",
            encoder=True,
            fields=("concepts.iterations", *_ENCODER),
            values={"": {"epochs": 1, "passes": 1, "training.batch_size": 64}},
        ),
        "linear-head": Method(
            title="Linear head on patch tokens",
            about="One linear layer learned the pseudo labels from the patch tokens of the frozen encoder.",
            learner="transfgu.baselines.linear_head:LinearHead",
            model="transfgu.baselines.linear_head:load_models",
            stages=STAGES,
            encoder=True,
            fields=(*OPTIMISED, "training.background_threshold"),
            values={"": {"epochs": 10, "passes": 1, "lr": 1e-3}},
        ),
    }
)  # fmt: skip
"""Every method by its name on the command line."""


def method(name: str) -> Method:
    """Return a method by its name.

    Raises:
        UserError: there is no such method; the message lists them.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown method {name}: {hint}choose one of {', '.join(METHODS)}", code="method-unknown")
    return METHODS[name]
