"""Define the settings of a run: frozen values, checked when built, with a digest per stage.

Each component of the method has a dataclass. The metadata of each field hold its meaning and unit, from which
``--help`` and the documents are made. The digest of a stage covers the fields that its artefact depends on, so a later
run with the same fields reuses the artefact.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from transfgu import formats
from transfgu.errors import BadShare, UserError
from transfgu.fields import MISSING, FieldInfo, check, convert, field, field_infos, listed
from transfgu.methods import METHODS, SHARED, STAGES, TRANSFGU, method
from transfgu.presets import FIRST_FORMAT, PRESET_FIELDS, PRESETS

Size = tuple[int, int]
MAX_PIXELS = 178_956_970
"""Pixels beyond which Pillow, too, takes an image for a small file that would fill the memory."""
DECODING_BYTES = 8
"""Bytes per pixel that decoding an image takes at most: four channels of Pillow's, three of ours, some between."""
SUGGESTION_WINDOWS = 4000
"""Default maximum number of windows per group from which `transfgu suggest` measures numbers of concepts."""
Protocol = Literal["published", "label", "stego"]

_GIVEN = "given"  # in a recipe's file: the fields that are not its preset's


def check_pixels(name: str, value: int) -> None:
    """Raise UserError unless `value` can be the largest number of pixels of an image."""
    check(4 <= value <= MAX_PIXELS, f"{name} must lie in 4..{MAX_PIXELS} pixels, not {value}")


def _later(default: Any, doc: str, unit: str = "") -> Any:
    """Declare a field of a component that is newer than the first format, whose runs had none of its methods."""
    return field(default, doc, unit, before=default)


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """Layout, classes and sizes of the images."""

    layout: Literal["shapes", "coco", "voc", "cityscapes", "lip", "folder"] = field(
        "shapes", "folder layout of the data set"
    )
    classes: str = field("shapes", "name of the label map and class list; `auto` numbers the concepts")
    curated: bool = field(False, "train and evaluate on the curated COCO-Stuff ids only")
    image_size: Size = field((320, 320), "size of images for pseudo labels and evaluation", "pixels, height width")
    feature_size: Size = field((640, 640), "size of images from which windows are cut", "pixels, height width")
    training_size: Size = field(
        (320, 320), "size of images from which training views are cropped", "pixels, height width"
    )
    interpolation: Literal["bilinear", "nearest"] = field(
        "bilinear", "interpolation of images for features and pseudo labels; the published code uses nearest for COCO"
    )
    orient: bool = field(
        False,
        "apply the orientation in an image's EXIF data, as viewers do; false: pixels as they are stored, on which the "
        "benchmarks' labels are drawn",
        before=False,
    )
    max_pixels: int = field(
        MAX_PIXELS,
        "maximum size of an image; larger ones are left out; tasks that read images request the memory for an image of "
        f"this size: {DECODING_BYTES} bytes per pixel",
        "pixels",
        before=MAX_PIXELS,
    )
    max_bad_share: float = field(
        0.1, "maximum share of unusable images or labels; a larger share ends the run", "0 to 1"
    )

    def __post_init__(self) -> None:
        for name in ("image_size", "feature_size", "training_size"):
            size = getattr(self, name)
            check(len(size) == 2 and min(size) > 0, f"dataset.{name} must be two positive sides, not {size}")
        check_pixels("dataset.max_pixels", self.max_pixels)
        check(0 <= self.max_bad_share <= 1, f"dataset.max_bad_share must lie in 0..1, not {self.max_bad_share}")

    @property
    def bad_share(self) -> BadShare:
        """The share of unusable inputs that a run accepts."""
        return BadShare(limit=self.max_bad_share)


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """The frozen self-supervised vision transformer."""

    name: str = field("vit_small_patch8_224.dino", "timm model name, or vit_shapes for the packaged one")
    weights: str = field("pretrained", "`pretrained`, `random`, or a path or URI (.pth, .safetensors)")
    batch_size: int = field(64, "batch size of the encoder", "windows")
    precision: Literal["auto", "float32", "bfloat16"] = field(
        "auto", "precision of the encoder's forward pass; auto: bfloat16 on GPUs that support it, else float32"
    )

    def __post_init__(self) -> None:
        check(self.batch_size > 0, f"encoder.batch_size must be positive, not {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class WindowsRecipe:
    """The sliding windows whose class tokens are clustered."""

    scales: tuple[float, ...] = field(
        (0.5, 0.4, 0.3, 0.2), "window sides as shares of the image's shorter side", "0 to 1"
    )
    groups: Literal["both", "foreground", "all"] = field(
        "both", "groups of windows: foreground and background, foreground only, or all windows in one group"
    )
    min_foreground: float = field(0.5, "minimum salient share of a foreground window", "0 to 1")
    min_background: float = field(0.8, "minimum non-salient share of a background window", "0 to 1")
    saliency_factor: float = field(
        1.0, "threshold of saliency: multiple of the mean class attention above which a patch is salient"
    )
    size: Size = field((320, 320), "size to which windows are resized before encoding", "pixels, height width")

    def __post_init__(self) -> None:
        check(
            bool(self.scales) and all(0 < s <= 1 for s in self.scales),
            f"windows.scales must lie in (0, 1], not {self.scales}",
        )
        for name in ("min_foreground", "min_background"):
            check(0 <= getattr(self, name) <= 1, f"windows.{name} must lie in 0..1, not {getattr(self, name)}")
        check(self.saliency_factor > 0, f"windows.saliency_factor must be positive, not {self.saliency_factor}")


@dataclass(frozen=True, kw_only=True)
class ConceptsRecipe:
    """K-Means over the class tokens."""

    things: int = field(0, "number of concepts clustered from foreground windows", "concepts")
    stuff: int = field(0, "number of concepts clustered from background windows", "concepts")
    iterations: int = field(100, "maximum number of K-Means iterations", "iterations")
    start: Literal["best", "faiss"] = field(
        "best",
        "initial centroids of K-Means; best: the best of several k-means++ starts on a sample; faiss: the rows that "
        "FAISS draws with seed 1, as published",
        before="best",
    )
    whiten: Literal["none", "foreground", "background", "both"] = field(
        "none",
        "windows whose features are whitened (equal variances, no correlations) and scaled "
        "to unit length before K-Means; both includes the windows of windows.groups all",
        before="none",
    )

    def __post_init__(self) -> None:
        check(self.things >= 0 and self.stuff >= 0, "concepts.things and concepts.stuff must not be negative")
        check(self.iterations > 0, f"concepts.iterations must be positive, not {self.iterations}")

    def whitens(self, windows: str) -> bool:
        """Return True if features of these windows ("foreground", "background" or "all") are whitened."""
        return self.whiten in ("both", windows)

    @property
    def count(self) -> int:
        """K, the number of concepts."""
        return self.things + self.stuff


@dataclass(frozen=True, kw_only=True)
class PseudoLabelsRecipe:
    """The concept maps that the decoder learns from."""

    gradient_scale: float = field(
        1.0, "factor of the gradients; the published code uses 1 / batch size, which is 1/8 or 1/2"
    )
    scales: tuple[float, ...] = field(
        (1.0,), "scales of the image, relative to dataset.image_size, whose maps are summed"
    )
    smoothing: int = field(1, "side of the mean filter on the maps; 1: no filter", "patches")
    refine: int = field(
        0,
        "steps in which each patch's maps become the mean over those of the 5 x 5 patches around it, weighted by the "
        "similarity of the encoder's tokens; 0: none",
        "steps",
        before=0,
    )

    def __post_init__(self) -> None:
        check(self.gradient_scale > 0, f"pseudo_labels.gradient_scale must be positive, not {self.gradient_scale}")
        check(self.refine >= 0, f"pseudo_labels.refine must not be negative, not {self.refine}")
        check(bool(self.scales) and min(self.scales) > 0, f"pseudo_labels.scales must be positive, not {self.scales}")
        check(
            self.smoothing > 0 and self.smoothing % 2 == 1, f"pseudo_labels.smoothing must be odd, not {self.smoothing}"
        )


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe:
    """The mask decoder."""

    depth: int = field(
        2, "number of transformer blocks; 0: masks are cosines of projected patch tokens and class embeddings", "blocks"
    )
    dropout: float = field(0.1, "probability of dropout in training", "0 to 1")
    weights: str = field(
        "", "decoder weights to evaluate instead of the run's own: a path or URI (.pt, .pth, .safetensors)"
    )

    def __post_init__(self) -> None:
        check(self.depth >= 0, f"decoder.depth must not be negative, not {self.depth}")
        check(0 <= self.dropout < 1, f"decoder.dropout must lie in [0, 1), not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Bootstrapped training of the decoder."""

    epochs: int = field(200, "number of epochs", "epochs")
    passes: int = field(1, "passes over the training images in one epoch", "passes")
    lr: float = field(1e-4, "Adam's learning rate, constant")
    batch_size: int = field(256, "global batch size, divided among the workers", "images")
    lr_scaling: Literal["none", "linear", "sqrt"] = field(
        "none",
        "multiply training.lr by training.batch_size / training.lr_batch_size (linear) or by its square root (sqrt)",
        before="none",
    )
    lr_batch_size: int = field(
        0, "batch size for which training.lr was chosen, with training.lr_scaling; 0: none", "images", before=0
    )
    weight_decay: float = field(5e-4, "weight decay on parameters of two or more dimensions")
    omega_1: float = field(1.0, "weight of the diversity loss")
    omega_2: float = field(0.3, "weight of the uncertainty loss")
    alpha_start: float = field(0.03, "weight of the negative label in the peer loss, after a teacher update")
    alpha_step: float = field(0.01, "increase of alpha", "per epoch")
    alpha_end: float = field(0.10, "alpha's upper limit")
    background_threshold: float = field(
        0.1, "T_bg: background where no scaled map exceeds it (benchmarks with a background)"
    )
    certain_share: float = field(
        1.0,
        "share of each class's patches in a batch with a label: those with the largest lead of the best map",
        "0 to 1",
        before=1.0,
    )
    teacher_start: int = field(2, "epoch at whose start the student first becomes the teacher", "epochs")
    teacher_every: tuple[int, ...] = field(
        (2,), "epochs between teacher updates; each value holds for ten epochs", "epochs"
    )
    sampler: Literal["shuffle", "published"] = field(
        "shuffle",
        "order of the images; shuffle: new in each epoch; published: by torch's DistributedSampler with seed 0, the "
        "same in each epoch",
        before="shuffle",
    )
    colours: Literal["image", "batch"] = field(
        "image",
        "scope of the random jitter, greyscale and blur of training views: each image, or each batch, as published",
        before="image",
    )
    views: bool = field(True, "random views (jitter, greyscale, blur, crop, flip); false: the resized image itself")
    evaluate_every: int = field(1, "number of epochs between two evaluations on the validation set", "epochs")
    precision: Literal["auto", "float32", "bfloat16"] = field(
        "auto",
        "precision of the matrix products of student and teacher in training; auto: bfloat16 on GPUs that support it, "
        "else float32; the loss is float32",
        before="auto",
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "passes", "batch_size", "evaluate_every", "teacher_start"):
            check(getattr(self, name) > 0, f"training.{name} must be positive, not {getattr(self, name)}")
        check(0 < self.certain_share <= 1, f"training.certain_share must lie in (0, 1], not {self.certain_share}")
        check(self.lr > 0, f"training.lr must be positive, not {self.lr}")
        check(self.lr_batch_size >= 0, f"training.lr_batch_size must not be negative, not {self.lr_batch_size}")
        check(
            (self.lr_scaling == "none") == (self.lr_batch_size == 0),
            f"training.lr_scaling ({self.lr_scaling}) and training.lr_batch_size ({self.lr_batch_size}) go together: "
            "set both, or neither",
            code="field-combination",
        )
        for name in ("omega_1", "omega_2", "alpha_start", "alpha_step", "alpha_end", "weight_decay"):
            check(getattr(self, name) >= 0, f"training.{name} must not be negative, not {getattr(self, name)}")
        check(
            bool(self.teacher_every) and min(self.teacher_every) > 0, "training.teacher_every must list positive epochs"
        )

    @property
    def scaled_lr(self) -> float:
        """Return the optimiser's learning rate: `lr`, scaled to `batch_size` where `lr_scaling` asks for it.

        Sources: linear, Goyal et al. 2017 (arXiv:1706.02677), found with SGD; square root, Malladi et al. 2022
        (arXiv:2205.10287), derived for Adam.
        """
        ratio = self.batch_size / self.lr_batch_size if self.lr_batch_size else 1.0
        return self.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.lr_scaling]


@dataclass(frozen=True, kw_only=True)
class IICRecipe:
    """IIC's network and loss."""

    widths: tuple[int, ...] = _later((64, 128, 256, 256, 512, 512), "channels of IIC's six convolutions", "channels")
    auxiliary: int = _later(0, "classes of IIC's over-clustering head; 0: three times the classes", "classes")
    half_side: int = _later(10, "maximum displacement between views in IIC's loss", "pixels")
    entropy_weight: float = _later(1.0, "lambda: weight of the marginal entropies in IIC's loss")
    affine: bool = _later(False, "also rotate, shear and scale IIC's second view")

    def __post_init__(self) -> None:
        check(
            len(self.widths) == 6 and min(self.widths) > 0, f"iic.widths must list six widths, not {list(self.widths)}"
        )
        check(self.auxiliary == 0 or self.auxiliary >= 2, f"iic.auxiliary must be 0, or 2 or more: {self.auxiliary}")
        check(self.half_side >= 0, f"iic.half_side must not be negative, not {self.half_side}")
        check(self.entropy_weight > 0, f"iic.entropy_weight must be positive, not {self.entropy_weight}")


@dataclass(frozen=True, kw_only=True)
class PiCIERecipe:
    """PiCIE's network and clustering."""

    backbone: str = _later("resnet18", "PiCIE's residual network, timm's name")
    weights: str = _later("pretrained", "its weights: `pretrained`, `random`, or a path or URI (.pth, .safetensors)")
    width: int = _later(128, "channels of PiCIE's pixel features", "channels")
    auxiliary: int = _later(100, "clusters of PiCIE's auxiliary over-clustering", "clusters")
    init_batches: int = _later(20, "batches at the start of an epoch for PiCIE's initial centroids", "batches")
    start_iterations: int = _later(20, "K-Means iterations for PiCIE's initial centroids", "iterations")

    def __post_init__(self) -> None:
        for name in ("width", "init_batches", "start_iterations"):
            check(getattr(self, name) > 0, f"picie.{name} must be positive, not {getattr(self, name)}")
        check(self.auxiliary >= 2, f"picie.auxiliary must be 2 or more, not {self.auxiliary}: see picie-no-aux")


@dataclass(frozen=True, kw_only=True)
class MaskContrastRecipe:
    """MaskContrast's network, masks and loss."""

    object_masks: str = _later(
        "",
        "folder of object masks for MaskContrast, PNGs with the images' names, 0 outside the object: a path or URI; "
        "empty: masks from the encoder's class attention",
    )
    backbone: str = _later("resnet50", "MaskContrast's residual network, timm's name")
    weights: str = _later("pretrained", "its weights: `pretrained`, `random`, or a path or URI (.pth, .safetensors)")
    width: int = _later(32, "channels of MaskContrast's pixel embeddings", "channels")
    queue: int = _later(256, "prototypes of earlier batches in MaskContrast's loss", "prototypes")
    temperature: float = _later(0.5, "temperature of MaskContrast's contrastive loss")
    momentum: float = _later(0.999, "momentum of MaskContrast's second encoder", "0 to 1")

    def __post_init__(self) -> None:
        for name in ("width", "queue", "temperature"):
            check(getattr(self, name) > 0, f"maskcontrast.{name} must be positive, not {getattr(self, name)}")
        check(0 <= self.momentum <= 1, f"maskcontrast.momentum must lie in 0..1, not {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """Protocol and averaging of the scores."""

    protocol: Protocol = field(
        "published",
        "resolution of the scores; published: image and label at dataset.image_size; label: the label's own "
        "resolution; stego: shorter side to dataset.image_size and centre crop, as in later work on COCO-Stuff-27",
    )
    batch_size: int = field(16, "batch size of evaluation", "images")
    scales: tuple[float, ...] = field(
        (1.0,),
        "image sizes whose logits are averaged in evaluation and prediction, relative to dataset.image_size; the "
        "scores between epochs use size 1 only",
        before=(1.0,),
    )
    flip: bool = field(False, "also average with the logits of the image mirrored left to right", before=False)

    def __post_init__(self) -> None:
        check(bool(self.scales) and min(self.scales) > 0, f"evaluation.scales must be positive, not {self.scales}")
        check(self.batch_size > 0, f"evaluation.batch_size must be positive, not {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class ComputeRecipe:
    """Resources, cache and trackers. No artefact depends on them, so they are in no digest."""

    workers: int = field(
        0,
        "number of training workers; 0: one per `gpus_per_actor` GPUs of the cluster, or one without GPUs",
        "workers",
    )
    actors: int = field(
        0,
        "maximum number of encoder actors; 0: one per `gpus_per_actor` GPUs of the cluster, without GPUs one per node",
        "actors",
    )
    gpus_per_actor: float = field(1.0, "GPUs per encoder actor or training worker, if the cluster has GPUs", "GPUs")
    cpus_per_actor: float = field(1.0, "CPUs per encoder actor or training worker", "CPUs")
    resize_seconds: float = field(
        60.0,
        "interval at which training looks for new nodes; if there are some, it restarts the current epoch with more "
        "workers",
        "seconds",
    )
    resident_gib: float = field(
        1.0,
        "maximum size of the frozen features, of the training images and of the validation images that a training "
        "worker keeps in memory (1: 2,700 images of 320 x 320); larger sets are cached on disk, or read every epoch",
        "GiB",
    )
    cache_folder: str = field(
        "",
        "folder on each node's own disk for decoded training images and their maps, so that only the first "
        "epoch reads them from storage; empty: the node's environment variable TRANSFGU_CACHE, or transfgu-cache-UID "
        "in the system's folder of temporary files",
        before="",
    )
    cache_gib: float = field(
        128.0,
        "maximum size of all caches in `cache_folder`; the least recently used ones are removed (128: "
        "COCO's 118,287 images of 320 x 320 take 44 with maps of 27 concepts, 95 of 171); 0: no cache",
        "GiB",
        before=128.0,
    )
    track: str = field("tensorboard", "experiment trackers, separated by commas: tensorboard, mlflow, wandb; or none")

    def __post_init__(self) -> None:
        for name in ("workers", "actors", "resident_gib", "resize_seconds", "cache_gib"):
            check(getattr(self, name) >= 0, f"compute.{name} must not be negative, not {getattr(self, name)}")
        check(
            self.gpus_per_actor > 0 and self.cpus_per_actor > 0,
            "compute.gpus_per_actor and cpus_per_actor must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run: everything that its result depends on, and `compute`, which does not change it."""

    preset: str = field("shapes", "preset that the recipe started from")
    method: str = field(TRANSFGU, f"method to train: {', '.join(METHODS)}; see docs/methods.md", before=TRANSFGU)
    data: str = field("", "folder of the data set, a path or URI; empty: drawn scenes (preset shapes only)")
    labels: str = field("", "folder of label PNGs for the folder layout, a path or URI; empty: no labels")
    limit: int = field(0, "maximum number of images per split; 0: all", "images")
    seed: int = field(2021, "seed of the drawn scenes, of K-Means and of training")
    dataset: DatasetRecipe = DatasetRecipe()
    encoder: EncoderRecipe = EncoderRecipe()
    windows: WindowsRecipe = WindowsRecipe()
    concepts: ConceptsRecipe = ConceptsRecipe()
    pseudo_labels: PseudoLabelsRecipe = PseudoLabelsRecipe()
    decoder: DecoderRecipe = DecoderRecipe()
    training: TrainingRecipe = TrainingRecipe()
    iic: IICRecipe = IICRecipe()
    picie: PiCIERecipe = PiCIERecipe()
    maskcontrast: MaskContrastRecipe = MaskContrastRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    compute: ComputeRecipe = ComputeRecipe()

    def __post_init__(self) -> None:
        method(self.method)
        check(self.limit >= 0, f"limit must not be negative, not {self.limit}")
        check(
            self.windows.groups == "both" or self.concepts.stuff == 0 or self.windows.groups == "all",
            "concepts.stuff requires background windows: set windows.groups to both or all",
            code="windows-missing",
        )
        check(
            self.concepts.count >= 2, "a run needs at least two concepts: set --things and --stuff", code="concepts-few"
        )

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the method, in order."""
        return METHODS[self.method].stages

    @property
    def background(self) -> bool:
        """True if class 0 is a background without a concept (benchmarks without stuff)."""
        return self.concepts.stuff == 0

    @property
    def classes(self) -> int:
        """C: the number of concepts, plus 1 if there is a background."""
        return self.concepts.count + int(self.background)

    def flat(self) -> dict[str, Any]:
        """Return every field by its dotted name, components in the order of the method; tuples as lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in _walk(self)}

    def with_fields(self, values: Mapping[str, Any]) -> "Recipe":
        """Return a copy with the fields of the given dotted names replaced.

        A name may be short (``omega_1``) if only one component has it. Values may be text, as from a command line
        or YAML; they are converted to the field's type.

        Raises:
            UserError: a name without a field (the message lists similar ones), or a value of another type.
        """
        tops: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {}
        for given, value in values.items():
            name = field_name(given)
            kind = FIELDS[name].kind
            component, _, leaf = name.rpartition(".")
            (parts.setdefault(component, {}) if component else tops)[leaf] = convert(name, kind, value)
        tops.update({c: replace(getattr(self, c), **v) for c, v in parts.items()})
        return replace(self, **tops)

    def stage_fields(self, stage: str) -> dict[str, Any]:
        """Return the fields, by dotted name, that the artefact of `stage` depends on, with those of earlier stages."""
        flat = self.flat()
        if not self.concepts.stuff and self.windows.groups == "both":
            flat["windows.groups"] = "foreground"  # the others are not clustered, so they are not kept
        before = STAGES[: STAGES.index(stage) + 1]
        names = [n for s in self.stages if s in before for n in _own_fields(self, s)]
        return {n: flat[n] for n in FIELDS if n in names}

    def others_fields(self) -> dict[str, str]:
        """Return the fields (dotted names) that only other methods have, each with the first method that has it."""
        own = _all_stage_fields(self)
        others = [replace(self, method=other) for other in METHODS]
        return {n: other.method for other in reversed(others) for n in _all_stage_fields(other) if n not in own}

    def digest(self, stage: str) -> str:
        """Return the hexadecimal SHA-256 of :meth:`stage_fields`, the same in every version.

        Fields count by their first names, and newer fields only if their value differs from that of
        earlier runs, so that checkpoints named by an earlier version with this digest are found again.
        """
        fields = {
            (FIELDS[name].was or (name,))[0]: value
            for name, value in self.stage_fields(stage).items()
            if FIELDS[name].before is MISSING or value != listed(FIELDS[name].before)
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def given(self) -> set[str]:
        """Return the dotted names of the fields whose values are not those of the recipe's preset."""
        usual = preset(self.preset, self.method).flat()
        given = {name for name, value in self.flat().items() if value != usual[name]}
        return given if self.method == TRANSFGU else given | {"method"}

    def to_yaml(self, given: Collection[str] | None = None) -> str:
        """Return the resolved recipe as YAML; :func:`from_yaml` reads it.

        Args:
            given: dotted names of the fields given by the user, now or when the run started; None: fields whose values
                differ from the preset's.
        """
        tree: dict[str, Any] = {formats.KEY: formats.FORMAT, _GIVEN: sorted(self.given() if given is None else given)}
        for name, value in self.flat().items():
            component, _, leaf = name.rpartition(".")
            (tree.setdefault(component, {}) if component else tree)[leaf] = value
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def from_yaml(text: str | bytes, name: str = "the recipe", *, resolved: bool = False) -> Recipe:
    """Read a recipe from YAML.

    Args:
        text: content of the file.
        name: name of the file in error messages.
        resolved: the file is that of a run, with every field that its version had; this also holds for files with
            a format number. A field that is missing in such a file is newer, and gets the value that runs had
            before it; in other files a missing field gets the value of the recipe's preset.

    Raises:
        UserError: not YAML, a newer format, an unknown preset or field, or a bad value.
    """
    tree = _mapping(text, name)
    resolved = resolved or formats.KEY in tree
    formats.check(tree.pop(formats.KEY, None), name)
    tree.pop(_GIVEN, None)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values.update({f"{key}.{leaf}": v for leaf, v in value.items()})
        else:
            values[str(key)] = value
    if resolved:
        values = upgraded(values)
    which, how = values.get("preset", "shapes"), values.get("method", TRANSFGU)
    if not isinstance(which, str) or not isinstance(how, str):
        raise UserError(f"{name} must name its preset and its method as text", code="recipe-damaged")
    return preset(which, how).with_fields(values)


def given_in(text: str | bytes, name: str = "the recipe") -> set[str]:
    """Return the fields that the user of a run gave, by present dotted names; the others were its preset's.

    The first format does not list them: there a field counts as given if it differs from its preset at that time.

    Raises:
        UserError: as :func:`from_yaml`.
    """
    tree = _mapping(text, name)
    if _GIVEN in tree:
        with formats.damage(name, "restore it, or choose another --run"):
            former = _former_names()
            return {former.get(str(n), str(n)) for n in tree[_GIVEN]}
    recipe = from_yaml(text, name, resolved=True)
    usual = preset(recipe.preset, recipe.method).with_fields(FIRST_FORMAT.get(recipe.preset, {})).flat()
    return {n for n, value in recipe.flat().items() if value != usual[n] and FIELDS[n].before is MISSING}


def _mapping(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)  # PyYAML's parser in C crashes on deep nesting
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is not YAML in UTF-8: {error}", code="recipe-damaged") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name} must be a YAML mapping of fields", code="recipe-damaged")
    return tree


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields written by a run of any earlier version, by present names, with newer fields added.

    Args:
        values: all fields of the run's version, or those of one stage, by dotted name.

    Returns:
        The fields by present names, and each newer field with the value that runs had before it.
    """
    former = _former_names()
    now = {former.get(name, name): value for name, value in values.items()}
    later = {n: listed(info.before) for n, info in FIELDS.items() if info.before is not MISSING and n not in now}
    return {**now, **later}


def _walk(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            for g in dataclasses.fields(value):
                yield f"{f.name}.{g.name}", getattr(value, g.name)
        else:
            yield f.name, value


FIELDS: dict[str, FieldInfo] = field_infos(Recipe)
"""Fields of the recipe by dotted name."""


def _former_names() -> dict[str, str]:
    return {former: name for name, info in FIELDS.items() for former in info.was}


def _short_names() -> dict[str, str]:
    leaves = [n.rpartition(".")[2] for n in FIELDS]
    return {leaf: n for n, leaf in zip(FIELDS, leaves, strict=True) if leaves.count(leaf) == 1 and leaf != n}


SHORT_NAMES: Mapping[str, str] = types.MappingProxyType(_short_names())
"""Short names, without the component, that only one field has: ``omega_1`` for ``training.omega_1``."""


def field_name(name: str) -> str:
    """Return the dotted name of a field from its dotted or short name.

    Raises:
        UserError: no such field; the message lists similar ones.
    """
    full = SHORT_NAMES.get(name, name)
    if full not in FIELDS:
        full = _former_names().get(full, full)
    if full not in FIELDS:
        near = difflib.get_close_matches(name, [*FIELDS, *SHORT_NAMES], n=4, cutoff=0.4)
        raise UserError(
            f"the recipe has no field {name}; similar: {', '.join(near) or ', '.join(FIELDS)}", code="field-unknown"
        )
    return full


def _own_fields(recipe: Recipe, stage: str) -> list[str]:
    """Return the fields that a stage's artefact depends on, without those of earlier stages."""
    how = METHODS[recipe.method]
    if stage == "training":
        shared = () if recipe.method == TRANSFGU else SHARED
        return _component("method", *shared, *how.fields)(recipe)
    if stage == "pseudo_labels" and how.proposals:
        return _component("method", *how.proposals)(recipe)
    return _OWN_FIELDS[stage](recipe)


def _all_stage_fields(recipe: Recipe) -> dict[str, Any]:
    return recipe.stage_fields(STAGES[-1])


def _component(*names: str) -> typing.Callable[[Recipe], list[str]]:
    return lambda _: [n for n in FIELDS if n in names or n.partition(".")[0] in names]


def _samples_fields(recipe: Recipe) -> list[str]:
    own = ["data", "labels", "limit", "dataset.layout", "dataset.classes", "dataset.curated"]
    # Scenes are drawn from the seed; a real data set's sample list does not depend on it.
    return [*own, "seed"] if recipe.dataset.layout == "shapes" else own


_OWN_FIELDS: Mapping[str, typing.Callable[[Recipe], list[str]]] = types.MappingProxyType(
    {
        "samples": _samples_fields,
        "features": lambda r: [
            *("dataset.feature_size", "dataset.interpolation", "dataset.orient", "dataset.max_pixels"),
            *("encoder.name", "encoder.weights", "encoder.precision"),
            *(f"windows.{f.name}" for f in dataclasses.fields(WindowsRecipe)),
        ],
        "concepts": _component("concepts", "seed"),
        "pseudo_labels": lambda r: ["dataset.image_size", *_component("pseudo_labels")(r)],
        "evaluation": lambda r: [
            *("decoder.weights", "evaluation.protocol", "evaluation.scales", "evaluation.flip"),
        ],
    }
)
# dataset.max_bad_share may end a run, but does not change results; batch sizes of frozen forwards change only speed.


def _published(**changes: Any) -> Recipe:
    return Recipe(concepts=ConceptsRecipe(things=12, stuff=15)).with_fields(changes)


def preset(name: str, how: str = TRANSFGU) -> Recipe:
    """Return the recipe of a benchmark as published.

    Args:
        name: the benchmark.
        how: name of the method.

    Raises:
        UserError: an unknown name; the message lists the known ones.
    """
    if name not in PRESET_FIELDS:
        raise UserError(f"unknown preset {name}; choose one of {', '.join(PRESETS)}", code="preset-unknown")
    recipe = _published(preset=name, **PRESET_FIELDS[name])
    if how == TRANSFGU:
        return recipe
    values = method(how).values
    return recipe.with_fields({"method": how}).with_fields(values.get("", {})).with_fields(values.get(name, {}))
