"""List the fields in which each benchmark differs from the recipe's defaults, by dotted or short name."""

import types
from collections.abc import Mapping
from typing import Any

_COCO_27: dict[str, Any] = {
    "dataset.layout": "coco", "dataset.classes": "coco_stuff_27", "things": 12, "stuff": 15, "gradient_scale": 1 / 8,
}  # fmt: skip

_COCO_SLOW: dict[str, Any] = {"teacher_start": 3, "teacher_every": (3, 3, 3, 2)}

_FIXED_WINDOWS: dict[str, Any] = {"groups": "all", "gradient_scale": 1 / 2}

_LIP: dict[str, Any] = {
    **_FIXED_WINDOWS, "dataset.layout": "lip", "epochs": 100, "training.batch_size": 512, "lr": 2e-5, "stuff": 0,
    "image_size": (640, 320), "feature_size": (1280, 640), "training_size": (480, 240),
}  # fmt: skip

SMALL_ENCODER: Mapping[str, Any] = types.MappingProxyType(
    {
        "windows.scales": (0.5, 0.4, 0.3), "whiten": "foreground", "pseudo_labels.scales": (0.75, 1.0, 1.5),
        "smoothing": 3, "refine": 2, "certain_share": 0.5, "epochs": 6, "passes": 4, "lr": 1e-2, "omega_1": 0.0,
        "omega_2": 0.0, "teacher_start": 7, "decoder.depth": 0, "training.batch_size": 16, "views": False,
        "evaluation.scales": (1.0, 1.5), "flip": True,
    }
)  # fmt: skip
"""Measured values for an encoder of a few channels that was trained on small images (docs/results.md)."""

PRESET_FIELDS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "shapes": {
            "dataset.layout": "shapes", "dataset.classes": "shapes", "things": 6, "stuff": 4,
            "image_size": (128, 128), "feature_size": (128, 128), "training_size": (128, 128),
            "encoder.name": "vit_shapes", "encoder.batch_size": 256, "windows.size": (48, 48), **SMALL_ENCODER,
        },
        "coco-stuff-27": _COCO_27,
        "coco-stuff-27-curated": {**_COCO_27, "curated": True, "lr": 2.2e-4, "teacher_start": 1, "teacher_every": (1,)},
        "coco-stuff-171": {**_COCO_27, **_COCO_SLOW, "dataset.classes": "coco_stuff_171", "things": 80, "stuff": 91},
        "coco-80": {
            **_COCO_27, **_COCO_SLOW, "dataset.classes": "coco_80", "things": 80, "stuff": 0, "groups": "foreground",
        },
        "pascal-voc": {
            "dataset.layout": "voc", "dataset.classes": "pascal_voc", "things": 20, "stuff": 0, "groups": "foreground",
            "windows.scales": (0.6, 0.5, 0.4, 0.3), "gradient_scale": 1 / 8, "epochs": 100, "passes": 20,
            "training.batch_size": 512, "teacher_start": 5, "teacher_every": (5, 5, 5, 5, 4, 4, 4, 4, 4, 3),
        },
        "cityscapes": {
            **_FIXED_WINDOWS, "dataset.layout": "cityscapes", "dataset.classes": "cityscapes_27",
            "things": 0, "stuff": 27,
            "image_size": (320, 640), "feature_size": (640, 1280), "training_size": (320, 640),
            "epochs": 50, "passes": 20, "lr": 5e-5, "teacher_start": 1, "teacher_every": (1,),
        },
        "lip-5": {**_LIP, "dataset.classes": "lip_5", "things": 5, "lr": 1e-4},
        "lip-16": {**_LIP, "dataset.classes": "lip_16", "things": 16},
        "lip-19": {
            **_LIP, **_COCO_SLOW, "dataset.classes": "lip_19", "things": 19, "training_size": (640, 320),
            "training.batch_size": 256,
        },
        "folder": {
            "dataset.layout": "folder", "dataset.classes": "auto", "dataset.orient": True, "things": 12, "stuff": 15,
        },
    }
)  # fmt: skip

PRESETS: tuple[str, ...] = tuple(PRESET_FIELDS)
"""The benchmarks of the paper (Table 1), `folder` for your own images, and `shapes`, the embedded demonstration."""

FIRST_FORMAT: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "shapes": {
            "windows.scales": (0.5, 0.4, 0.3, 0.2), "epochs": 4, "lr": 1e-3, "omega_1": 1.0, "omega_2": 0.3,
            "teacher_start": 2, "decoder.depth": 2,
        }
    }
)  # fmt: skip
"""Former values of presets in the first file format, whose recipes do not list the fields that the user gave."""


def published(layout: str) -> Mapping[str, Any]:
    """Return the fields in which a run follows the published code where this project does otherwise.

    Args:
        layout: the data set's; for `coco` images are shrunk by nearest neighbour, too.

    Source: damo-cv/TransFGU (utils/kmeans.py, cocostuff_trainval.py, models/segmenter/segmenter_thingstuff.py).
    """
    fields = {"concepts.start": "faiss", "training.sampler": "published", "training.colours": "batch"}
    return fields | ({"dataset.interpolation": "nearest"} if layout == "coco" else {})
