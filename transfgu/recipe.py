"""A run is a function of its recipe: frozen values, checked when built, digested stage by stage.

Each component of the method has one dataclass here, and every field carries its meaning and unit once, as metadata,
from which the command line's ``--help`` and the documents are made. A stage's digest covers just the fields that
its artefact depends on, so what is already computed is recognised by any later run with the same ones.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml

from transfgu import formats
from transfgu.errors import UserError

Size = tuple[int, int]
Protocol = Literal["published", "label", "stego"]

_GIVEN = "given"  # in a recipe's file: the fields that are not its preset's

MISSING = object()
"""Stands for a value that is not there where None may be one."""

STAGES = ("samples", "features", "concepts", "pseudo_labels", "training", "evaluation")


def _field(default: Any, doc: str, unit: str = "", **history: Any) -> Any:
    """One field of a recipe.

    Args:
        default: its value unless a preset or the user gives another.
        doc: its meaning, for `--help` and the documents.
        unit: of its value.
        history: `before`, for a field that is younger than the first format: the value that runs made before it
            had; `was`, a tuple of the dotted names that it had earlier.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "unit": unit, **history})


def _check(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """What the images are, and the sizes they are brought to."""

    layout: Literal["shapes", "coco", "voc", "cityscapes", "lip", "folder"] = _field(
        "shapes", "folder layout of the data set"
    )
    classes: str = _field("shapes", "name of the label map and class list; `auto` numbers the concepts")
    curated: bool = _field(False, "train and evaluate on the curated COCO-Stuff ids alone")
    image_size: Size = _field((320, 320), "images for pseudo labels and evaluation", "pixels, height width")
    feature_size: Size = _field((640, 640), "images the windows are cut from", "pixels, height width")
    training_size: Size = _field((320, 320), "images the training views are cropped from", "pixels, height width")
    interpolation: Literal["bilinear", "nearest"] = _field(
        "bilinear", "how images are resized for features and pseudo labels; the published code used nearest for COCO"
    )
    max_bad_share: float = _field(0.1, "share of unusable images or labels that ends the run", "0 to 1")

    def __post_init__(self) -> None:
        for name in ("image_size", "feature_size", "training_size"):
            size = getattr(self, name)
            _check(len(size) == 2 and min(size) > 0, f"dataset.{name} must be two positive sides, not {size}")
        _check(0 <= self.max_bad_share <= 1, f"dataset.max_bad_share must lie in 0..1, not {self.max_bad_share}")


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """The frozen self-supervised vision transformer."""

    name: str = _field("vit_small_patch8_224.dino", "timm model name, or vit_shapes for the packaged one")
    weights: str = _field("pretrained", "`pretrained`, `random`, or a path or URI (.pth, .safetensors)")
    batch_size: int = _field(64, "windows encoded at a time", "windows")
    precision: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "arithmetic of the encoder's forward; auto: bfloat16 on GPUs that have it, else float32"
    )

    def __post_init__(self) -> None:
        _check(self.batch_size > 0, f"encoder.batch_size must be positive, not {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class WindowsRecipe:
    """The sliding windows whose class tokens are clustered."""

    scales: tuple[float, ...] = _field(
        (0.5, 0.4, 0.3, 0.2), "window sides as shares of the image's shorter side", "0 to 1"
    )
    groups: Literal["both", "foreground", "all"] = _field(
        "both", "windows kept: foreground and background apart, foreground alone, or all of them together"
    )
    min_foreground: float = _field(0.5, "salient share above which a window is foreground", "0 to 1")
    min_background: float = _field(0.8, "unsalient share above which a window is background", "0 to 1")
    saliency_factor: float = _field(1.0, "a patch is salient where its class attention exceeds this times the mean")
    size: Size = _field((320, 320), "windows are resized to this before encoding", "pixels, height width")

    def __post_init__(self) -> None:
        _check(
            bool(self.scales) and all(0 < s <= 1 for s in self.scales),
            f"windows.scales must lie in (0, 1], not {self.scales}",
        )
        for name in ("min_foreground", "min_background"):
            _check(0 <= getattr(self, name) <= 1, f"windows.{name} must lie in 0..1, not {getattr(self, name)}")
        _check(self.saliency_factor > 0, f"windows.saliency_factor must be positive, not {self.saliency_factor}")


@dataclass(frozen=True, kw_only=True)
class ConceptsRecipe:
    """K-Means over the class tokens."""

    things: int = _field(0, "concepts clustered from foreground windows", "concepts")
    stuff: int = _field(0, "concepts clustered from background windows", "concepts")
    iterations: int = _field(100, "K-Means iterations at most", "iterations")

    def __post_init__(self) -> None:
        _check(self.things >= 0 and self.stuff >= 0, "concepts.things and concepts.stuff must not be negative")
        _check(self.iterations > 0, f"concepts.iterations must be positive, not {self.iterations}")

    @property
    def count(self) -> int:
        """K, the number of concepts."""
        return self.things + self.stuff


@dataclass(frozen=True, kw_only=True)
class PseudoLabelsRecipe:
    """The concept maps that the decoder learns from."""

    gradient_scale: float = _field(1.0, "factor of the gradients; the published code's was 1 / batch: 1/8 or 1/2")
    scales: tuple[float, ...] = _field((1.0,), "input sizes whose maps are summed, relative to dataset.image_size")
    smoothing: int = _field(1, "side of the mean filter over the maps; 1: none", "patches")

    def __post_init__(self) -> None:
        _check(self.gradient_scale > 0, f"pseudo_labels.gradient_scale must be positive, not {self.gradient_scale}")
        _check(bool(self.scales) and min(self.scales) > 0, f"pseudo_labels.scales must be positive, not {self.scales}")
        _check(
            self.smoothing > 0 and self.smoothing % 2 == 1, f"pseudo_labels.smoothing must be odd, not {self.smoothing}"
        )


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe:
    """The mask decoder."""

    depth: int = _field(2, "transformer blocks", "blocks")
    dropout: float = _field(0.1, "dropout probability in training", "0 to 1")
    weights: str = _field(
        "", "decoder weights to evaluate instead of the run's own: a path or URI (.pt, .pth, .safetensors)"
    )

    def __post_init__(self) -> None:
        _check(self.depth > 0, f"decoder.depth must be positive, not {self.depth}")
        _check(0 <= self.dropout < 1, f"decoder.dropout must lie in [0, 1), not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Bootstrapped training of the decoder."""

    epochs: int = _field(200, "epochs; the teacher's schedule and the scores count in them", "epochs")
    passes: int = _field(1, "passes over the training images in one epoch", "passes")
    lr: float = _field(1e-4, "Adam's learning rate, constant")
    batch_size: int = _field(256, "global batch, divided among the workers", "images")
    weight_decay: float = _field(5e-4, "weight decay on parameters of two or more dimensions")
    omega_1: float = _field(1.0, "weight of the diversity loss")
    omega_2: float = _field(0.3, "weight of the uncertainty loss")
    alpha_start: float = _field(0.03, "weight of the negative label in the peer loss, after a teacher update")
    alpha_step: float = _field(0.01, "rise of alpha", "per epoch")
    alpha_end: float = _field(0.10, "alpha's upper limit")
    background_threshold: float = _field(
        0.1, "T_bg: background where no scaled map exceeds it (benchmarks with a background)"
    )
    teacher_start: int = _field(2, "epoch at whose start the student first becomes the teacher", "epochs")
    teacher_every: tuple[int, ...] = _field(
        (2,), "epochs between teacher updates; each value holds for ten epochs", "epochs"
    )
    views: bool = _field(True, "random views (jitter, greyscale, blur, crop, flip); off: the resized image itself")
    evaluate_every: int = _field(1, "epochs between scores on the validation set", "epochs")

    def __post_init__(self) -> None:
        for name in ("epochs", "passes", "batch_size", "evaluate_every", "teacher_start"):
            _check(getattr(self, name) > 0, f"training.{name} must be positive, not {getattr(self, name)}")
        _check(self.lr > 0, f"training.lr must be positive, not {self.lr}")
        for name in ("omega_1", "omega_2", "alpha_start", "alpha_step", "alpha_end", "weight_decay"):
            _check(getattr(self, name) >= 0, f"training.{name} must not be negative, not {getattr(self, name)}")
        _check(
            bool(self.teacher_every) and min(self.teacher_every) > 0, "training.teacher_every must list positive epochs"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """How the scores are counted."""

    protocol: Protocol = _field(
        "published",
        "what scores are counted on; published: image and label at dataset.image_size; label: the label's own "
        "resolution; stego: shorter side to dataset.image_size and centre crop, as others count COCO-Stuff-27 since",
    )
    batch_size: int = _field(16, "images evaluated at a time", "images")
    scales: tuple[float, ...] = _field(
        (1.0,),
        "image sizes whose logits are averaged in evaluation and prediction, relative to dataset.image_size; the "
        "scores between epochs are of size 1 alone",
        before=(1.0,),
    )
    flip: bool = _field(False, "also average with the logits of the image mirrored left to right", before=False)

    def __post_init__(self) -> None:
        _check(bool(self.scales) and min(self.scales) > 0, f"evaluation.scales must be positive, not {self.scales}")
        _check(self.batch_size > 0, f"evaluation.batch_size must be positive, not {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class ComputeRecipe:
    """Where it runs, and who is told. No artefact depends on it, so it is in no digest."""

    workers: int = _field(
        0,
        "training workers; 0: one for each `gpus_per_actor` of the cluster's GPUs, without GPUs one in all",
        "workers",
    )
    actors: int = _field(
        0,
        "encoder actors at most; 0: one for each `gpus_per_actor` of the cluster's GPUs, without GPUs one a node",
        "actors",
    )
    gpus_per_actor: float = _field(
        1.0, "share of a GPU that an encoder actor or a training worker holds, where there are GPUs", "GPUs"
    )
    cpus_per_actor: float = _field(1.0, "CPUs that an encoder actor or a training worker holds", "CPUs")
    resize_seconds: float = _field(
        60.0,
        "how often training looks for nodes that came; where there are some it begins the epoch in hand again, with "
        "more workers",
        "seconds",
    )
    resident_gib: float = _field(
        1.0,
        "what a training worker keeps in memory of its images, decoded, if they are no larger; else they pass by anew "
        "in each epoch (1: 2,700 images of 320 x 320)",
        "GiB",
    )
    track: str = _field(
        "tensorboard", "who is told of each epoch: any of tensorboard, mlflow, wandb, with commas between; or none"
    )

    def __post_init__(self) -> None:
        for name in ("workers", "actors", "resident_gib", "resize_seconds"):
            _check(getattr(self, name) >= 0, f"compute.{name} must not be negative, not {getattr(self, name)}")
        _check(
            self.gpus_per_actor > 0 and self.cpus_per_actor > 0,
            "compute.gpus_per_actor and cpus_per_actor must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run's result depends on, plus `compute`, on which it does not."""

    preset: str = _field("shapes", "name of the preset it started from")
    data: str = _field("", "the data set's folder: a path or URI; empty: drawn (shapes alone)")
    labels: str = _field("", "folder of label PNGs, for the folder layout: a path or URI; empty: none")
    limit: int = _field(0, "images of each split at most; 0: all", "images")
    seed: int = _field(2021, "seed of scenes, K-Means and training")
    dataset: DatasetRecipe = DatasetRecipe()
    encoder: EncoderRecipe = EncoderRecipe()
    windows: WindowsRecipe = WindowsRecipe()
    concepts: ConceptsRecipe = ConceptsRecipe()
    pseudo_labels: PseudoLabelsRecipe = PseudoLabelsRecipe()
    decoder: DecoderRecipe = DecoderRecipe()
    training: TrainingRecipe = TrainingRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    compute: ComputeRecipe = ComputeRecipe()

    def __post_init__(self) -> None:
        _check(self.limit >= 0, f"limit must not be negative, not {self.limit}")
        _check(
            self.windows.groups == "both" or self.concepts.stuff == 0 or self.windows.groups == "all",
            "concepts.stuff needs background windows: set windows.groups to both or all",
        )
        _check(self.concepts.count >= 2, "a run needs at least two concepts: set --things and --stuff")

    @property
    def background(self) -> bool:
        """Whether class 0 is a background that no concept stands for (benchmarks without stuff)."""
        return self.concepts.stuff == 0

    @property
    def classes(self) -> int:
        """C: the concepts, and the background where there is one."""
        return self.concepts.count + int(self.background)

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted name, components in the order of the method; tuples as lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in _walk(self)}

    def with_fields(self, values: Mapping[str, Any]) -> "Recipe":
        """A copy with the fields of the given dotted names replaced.

        A name may be short (``omega_1``) where just one component has it. Values may be text, as from a command line
        or YAML; they are converted to the field's type.

        Raises:
            UserError: a name that is no field (the message lists near ones), or a value of another type.
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
        """The fields, by dotted name, that the artefact of `stage` depends on, its predecessors' included."""
        flat = self.flat()
        if not self.concepts.stuff and self.windows.groups == "both":
            flat["windows.groups"] = "foreground"  # nothing is clustered from the others, so they are not kept
        names = [n for s in STAGES[: STAGES.index(stage) + 1] for n in _OWN_FIELDS[s](self)]
        return {n: flat[n] for n in FIELDS if n in names}

    def digest(self, stage: str) -> str:
        """Hexadecimal SHA-256 of :meth:`stage_fields`, the same in every version.

        Fields count under their first names, and fields that came later only where their value differs from what
        earlier runs had: so checkpoints that an earlier version named by this digest are found again.
        """
        fields = {
            (FIELDS[name].was or (name,))[0]: value
            for name, value in self.stage_fields(stage).items()
            if FIELDS[name].before is MISSING or value != _listed(FIELDS[name].before)
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def given(self) -> set[str]:
        """Return the dotted names of the fields whose values are not those of the recipe's preset."""
        usual = preset(self.preset).flat()
        return {name for name, value in self.flat().items() if value != usual[name]}

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; :func:`from_yaml` reads it back."""
        tree: dict[str, Any] = {formats.KEY: formats.FORMAT, _GIVEN: sorted(self.given())}
        for name, value in self.flat().items():
            component, _, leaf = name.rpartition(".")
            (tree.setdefault(component, {}) if component else tree)[leaf] = value
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe:
    """Everything that decides what `transfgu.pretraining.objective` teaches an encoder, apart from the images."""

    seed: int = _field(0, "seed of images drawn, initial weights, order and views")
    patch_size: int = _field(8, "patch of the ViT", "pixels")
    width: int = _field(96, "channels of the ViT", "channels")
    depth: int = _field(4, "blocks of the ViT", "blocks")
    heads: int = _field(3, "attention heads of the ViT", "heads")
    global_size: int = _field(48, "side of the large views, which is the ViT's own", "pixels")
    local_size: int = _field(24, "side of the small views", "pixels")
    local_views: int = _field(4, "small views of an image; the last of them is shown in mosaics", "views")
    global_area: tuple[float, float] = _field((0.25, 1.0), "share of the image that large views see", "0 to 1")
    local_area: tuple[float, float] = _field((0.08, 0.35), "share of the image that small views see", "0 to 1")
    global_mosaic: int = _field(2, "tiles along a side of a mosaic of large views", "tiles")
    local_mosaic: int = _field(4, "tiles along a side of a mosaic of small views", "tiles")
    forget: float = _field(0.5, "share of views whose class token is reset before the last block", "0 to 1")
    prototypes: int = _field(32, "prototypes of DINO's cross-entropy: the clusters that it looks for", "prototypes")
    hidden: int = _field(256, "width of the projection head", "channels")
    bottleneck: int = _field(64, "width of what is compared", "channels")
    contrast_temperature: float = _field(0.15, "temperature of InfoNCE")
    student_temperature: float = _field(0.1, "temperature of the student's shares of prototypes")
    teacher_temperature: float = _field(0.05, "temperature of the teacher's")
    sinkhorn_iterations: int = _field(3, "Sinkhorn-Knopp iterations that balance the teacher's shares", "iterations")
    clustering_starts: float = _field(0.1, "share of the steps before DINO's cross-entropy sets in", "0 to 1")
    clustering_full: float = _field(0.25, "share of the steps after which it counts fully", "0 to 1")
    contrast_kept: float = _field(0.5, "weight that InfoNCE keeps from then on", "0 to 1")
    steps: int = _field(2400, "optimiser steps", "steps")
    batch_size: int = _field(64, "global batch, divided among the workers", "images")
    learning_rate: float = _field(1e-3, "AdamW's learning rate at a batch of 64")
    warmup: int = _field(100, "steps in which the learning rate rises", "steps")
    weight_decay: tuple[float, float] = _field((0.04, 0.2), "weight decay at the first and at the last step")
    teacher_momentum: float = _field(0.99, "of the teacher's average at the first step; 1 at the last", "0 to 1")
    clip: float = _field(3.0, "norm to which gradients are clipped")

    def __post_init__(self) -> None:
        positive = (
            *("patch_size", "width", "depth", "heads", "global_size", "local_size", "global_mosaic", "local_mosaic"),
            *("prototypes", "hidden", "bottleneck", "contrast_temperature", "student_temperature"),
            *("teacher_temperature", "steps", "batch_size", "learning_rate", "warmup", "clip"),
        )
        for name in positive:
            _check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("local_views", "sinkhorn_iterations"):
            _check(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("forget", "clustering_starts", "clustering_full", "contrast_kept", "teacher_momentum"):
            _check(0 <= getattr(self, name) <= 1, f"{name} must lie in 0..1, not {getattr(self, name)}")
        for name in ("global_area", "local_area"):
            low, high = getattr(self, name)
            _check(0 < low <= high <= 1, f"{name} must be two rising shares in (0, 1], not {low},{high}")
        for name in ("global_size", "local_size"):
            _check(
                getattr(self, name) % self.patch_size == 0,
                f"{name} {getattr(self, name)} is not a multiple of patch_size {self.patch_size}",
            )
        _check(self.width % self.heads == 0, f"width {self.width} is not a multiple of heads {self.heads}")
        _check(
            self.batch_size % self.local_mosaic**2 == 0 and self.batch_size % self.global_mosaic**2 == 0,
            f"batch_size {self.batch_size} does not fill mosaics of {self.local_mosaic**2} tiles",
        )


def from_yaml(text: str | bytes, name: str = "the recipe", *, resolved: bool = False) -> Recipe:
    """Read a recipe from YAML.

    Args:
        text: the file's content.
        name: what an error calls the file.
        resolved: the file is a run's own, and lists every field that its version knew. So is every file that carries
            a format number. In such a file a field that is missing came later, and takes the value that runs had
            before it; elsewhere a field that is left out takes the value of the recipe's preset.

    Raises:
        UserError: not YAML, a format to come, an unknown preset or field, or a bad value.
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
    return preset(values.get("preset", "shapes")).with_fields(values)


def given_in(text: str | bytes, name: str = "the recipe") -> set[str]:
    """Return which fields of a run's recipe its user gave, by today's dotted names; the others were its preset's.

    The first format did not say so: there a field counts as given where its value is not today's preset's.

    Raises:
        UserError: as :func:`from_yaml`.
    """
    tree = _mapping(text, name)
    if _GIVEN in tree:
        with formats.damage(name, "restore it, or choose another --run"):
            return {_FORMER_NAMES.get(str(n), str(n)) for n in tree[_GIVEN]}
    later = {n for n, info in FIELDS.items() if info.before is not MISSING}
    return from_yaml(text, name, resolved=True).given() - later


def _mapping(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is no YAML in UTF-8: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name} must be a YAML mapping of fields")
    return tree


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a run of any earlier version wrote them, by today's names, with those that came later.

    Args:
        values: every field that the version of the run knew, or those of one stage, by dotted name.

    Returns:
        The same under today's names, and each later field with the value that runs had before it.
    """
    now = {_FORMER_NAMES.get(name, name): value for name, value in values.items()}
    later = {n: _listed(info.before) for n, info in FIELDS.items() if info.before is not MISSING and n not in now}
    return {**now, **later}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class FieldInfo:
    """One field as a person meets it: dotted name, type, meaning and unit."""

    name: str
    kind: Any
    doc: str
    unit: str
    before: Any = MISSING
    """The value that runs had before the field came; MISSING for a field of the first format."""
    was: tuple[str, ...] = ()
    """Its former dotted names, the first one first."""


def _walk(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            for g in dataclasses.fields(value):
                yield f"{f.name}.{g.name}", getattr(value, g.name)
        else:
            yield f.name, value


def _field_infos(recipe: type, prefix: str = "") -> dict[str, FieldInfo]:
    hints = get_type_hints(recipe)
    infos: dict[str, FieldInfo] = {}
    for f in dataclasses.fields(recipe):
        name, kind = prefix + f.name, hints[f.name]
        if dataclasses.is_dataclass(kind):
            infos |= _field_infos(cast(type, kind), f"{name}.")
        else:
            infos[name] = FieldInfo(name, kind, **f.metadata)
    return infos


FIELDS: dict[str, FieldInfo] = _field_infos(Recipe)
"""Every field of the recipe by dotted name."""

_FORMER_NAMES: Mapping[str, str] = types.MappingProxyType(
    {former: name for name, info in FIELDS.items() for former in info.was}
)

PRETRAINING_FIELDS: dict[str, FieldInfo] = _field_infos(PretrainingRecipe)
"""Every field of the pretraining's recipe by name."""


def _short_names() -> dict[str, str]:
    leaves = [n.rpartition(".")[2] for n in FIELDS]
    return {leaf: n for n, leaf in zip(FIELDS, leaves, strict=True) if leaves.count(leaf) == 1 and leaf != n}


SHORT_NAMES: Mapping[str, str] = types.MappingProxyType(_short_names())
"""Names that need no component because just one field has them: ``omega_1`` for ``training.omega_1``."""


def field_name(name: str) -> str:
    """The dotted name of a field given by its dotted or short name.

    Raises:
        UserError: no such field; the message lists the nearest.
    """
    full = SHORT_NAMES.get(name, name)
    full = _FORMER_NAMES.get(full, full)
    if full not in FIELDS:
        near = difflib.get_close_matches(name, [*FIELDS, *SHORT_NAMES], n=4, cutoff=0.4)
        raise UserError(f"the recipe has no field {name}; near ones: {', '.join(near) or ', '.join(FIELDS)}")
    return full


def convert(name: str, kind: Any, value: Any) -> Any:
    """`value`, which may be text, as the type `kind` of field `name`.

    Lists are written ``1,2`` or ``1 2`` or ``1x2``.

    Raises:
        UserError: it is not of that type.
    """
    origin, args = get_origin(kind), get_args(kind)
    try:
        if origin is Literal:
            if value not in args:
                raise UserError(f"{name} must be one of {', '.join(map(str, args))}, not {value}")
            return value
        if origin is tuple:
            items = (
                value.replace("x", " ").replace(",", " ").strip("[]() ").split()
                if isinstance(value, str)
                else list(value)
            )
            if args[-1] is not Ellipsis and len(items) != len(args):
                raise UserError(f"{name} takes {len(args)} numbers, as in {'x'.join(['320'] * len(args))}, not {value}")
            return tuple(convert(name, args[0], i) for i in items)
        if kind is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            return value if isinstance(value, bool) else words[str(value).lower()]
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        converted = kind(value)
        if kind is float and not math.isfinite(converted):
            raise ValueError
        return converted
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{name} must be {kind_name(kind)}, not {value!r}") from None


def kind_name(kind: Any) -> str:
    """A field's type in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        many = "a list of" if args[-1] is Ellipsis else f"{len(args)}"
        return f"{many} {'numbers' if args[0] is float else 'whole numbers'}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[cast(type, kind)]


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
            *("dataset.feature_size", "dataset.interpolation"),
            *("encoder.name", "encoder.weights", "encoder.precision"),
            *(f"windows.{f.name}" for f in dataclasses.fields(WindowsRecipe)),
        ],
        "concepts": _component("concepts", "seed"),
        "pseudo_labels": lambda r: ["dataset.image_size", *_component("pseudo_labels")(r)],
        "training": lambda r: ["dataset.training_size", "decoder.depth", "decoder.dropout", *_component("training")(r)],
        "evaluation": lambda r: [
            *("decoder.weights", "evaluation.protocol", "evaluation.scales", "evaluation.flip"),
        ],
    }
)
# dataset.max_bad_share decides whether a run ends, not what it makes; batch sizes of frozen forwards change speed.


def _published(**changes: Any) -> Recipe:
    return Recipe(concepts=ConceptsRecipe(things=12, stuff=15)).with_fields(changes)


_COCO_27: dict[str, Any] = {
    "dataset.layout": "coco", "dataset.classes": "coco_stuff_27", "things": 12, "stuff": 15, "gradient_scale": 1 / 8,
}  # fmt: skip
_COCO_SLOW: dict[str, Any] = {"teacher_start": 3, "teacher_every": (3, 3, 3, 2)}
_FIXED_WINDOWS: dict[str, Any] = {"groups": "all", "gradient_scale": 1 / 2}
_LIP: dict[str, Any] = {
    **_FIXED_WINDOWS, "dataset.layout": "lip", "epochs": 100, "training.batch_size": 512, "lr": 2e-5, "stuff": 0,
    "image_size": (640, 320), "feature_size": (1280, 640), "training_size": (480, 240),
}  # fmt: skip

_PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "shapes": {
            "dataset.layout": "shapes", "dataset.classes": "shapes", "things": 6, "stuff": 4,
            "image_size": (128, 128), "feature_size": (128, 128), "training_size": (128, 128),
            "encoder.name": "vit_shapes", "encoder.batch_size": 256, "windows.size": (48, 48),
            "pseudo_labels.scales": (0.75, 1.0, 1.5), "smoothing": 3, "epochs": 4, "passes": 4, "lr": 1e-3,
            "training.batch_size": 16, "views": False,
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
        "folder": {"dataset.layout": "folder", "dataset.classes": "auto", "things": 12, "stuff": 15},
    }
)  # fmt: skip

PRESETS: tuple[str, ...] = tuple(_PRESETS)
"""The benchmarks of the paper (Table 1), `folder` for one's own images, and `shapes`, the embedded demonstration."""


def preset(name: str) -> Recipe:
    """The recipe of a benchmark as published.

    Raises:
        UserError: unknown name; the message lists the good ones.
    """
    if name not in _PRESETS:
        raise UserError(f"unknown preset {name}; choose one of {', '.join(PRESETS)}")
    return _published(preset=name, **_PRESETS[name])
