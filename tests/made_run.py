"""Create a run's folder quickly: real scenes, a tiny random encoder and decoder, artefacts by the library's code.

Only results that a stage computes on Ray are computed here directly.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from transfgu import datasets
from transfgu.datasets import images, shapes
from transfgu.datasets.packed_maps import pack_maps
from transfgu.decoder import MaskDecoder
from transfgu.encoder import Encoder, normalise
from transfgu.errors import LeftOut
from transfgu.methods import STAGES
from transfgu.metrics import confusion_matrix, scores
from transfgu.recipe import Recipe, preset
from transfgu.segmenter import Segmenter
from transfgu.store.artifacts import Manifest, Outcome, Run
from transfgu.windows import crop_windows, sliding_windows

SIDE = 64
TRAIN, VALIDATION = 6, 5


@dataclasses.dataclass(frozen=True)
class MadeRun:
    """A run's folder and the inputs of its report."""

    recipe: Recipe
    run: Run
    stages: dict[str, Manifest]
    metrics: dict[str, Any]


def make_run(folder: Path, *, labels: bool = True, things: int = 6, stuff: int = 4) -> MadeRun:
    """Create a complete run of six training and five validation scenes, with labels, or without as a user's images."""
    torch.manual_seed(0)
    weights = folder / "encoder.safetensors"
    write_encoder(weights)
    recipe = preset("shapes" if labels else "folder").with_fields(
        {
            "encoder.name": "tiny",
            "encoder.weights": str(weights),
            "things": things,
            "stuff": stuff,
            "image_size": (SIDE, SIDE),
            "feature_size": (SIDE, SIDE),
            "training_size": (SIDE, SIDE),
            "windows.size": (32, 32),
            "epochs": 6,
            "evaluation.scales": (1.0,),
            "flip": False,
        }
    )
    run = Run(str(folder / "run"))
    for stage in STAGES:
        (folder / "run" / stage).mkdir(parents=True, exist_ok=True)
    (folder / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    encoder = Encoder.from_pretrained("tiny", str(weights))
    _write_samples(folder, run, labels)
    _write_concepts(run, encoder, recipe)
    _write_pseudo_labels(run, encoder, recipe)
    decoder = MaskDecoder(encoder.width, recipe.classes, num_heads=encoder.num_heads)
    safetensors.torch.save_file(decoder.state_dict(), run.file("model.safetensors"))
    history = [
        {
            "epoch": epoch,
            "total": 2.0 / epoch,
            "peer": 1.5 / epoch,
            "diversity": 1.0 / epoch,
            "uncertainty": 0.9 / epoch,
            "alpha": None if epoch < 3 else 0.03,
            "teacher_updated": epoch in (3, 5),
            "mean_iou": 10.0 * epoch if labels else None,
            "pixel_accuracy": 12.0 * epoch if labels else None,
        }
        for epoch in range(1, 7)
    ]
    Path(run.artifact("training").file("history.json")).write_text(json.dumps(history))
    metrics: dict[str, Any] = {"preset": recipe.preset, "mean_iou": None, "pixel_accuracy": None, "iou": None}
    Path(run.artifact("evaluation").file("scores.json")).write_text(
        json.dumps({"mean_iou": None, "pixel_accuracy": None, "iou": None, "assignment": None})
    )
    if labels:
        metrics |= _write_evaluation(run, recipe)
    stages = {
        stage: Manifest(
            stage=stage,
            digest=recipe.digest(stage),
            fields=recipe.stage_fields(stage),
            seconds=1.5 + index,
            outcome=Outcome(
                items=TRAIN,
                left_out=(LeftOut(name="broken & bent.png", reason="truncated image"),) if stage == "features" else (),
                details={"windows": {"foreground": 40, "background": 14}} if stage == "features" else {},
            ),
        )
        for index, stage in enumerate(STAGES)
    }
    metrics["stages"] = {stage: {"skipped": stage == "samples"} for stage in stages}
    return MadeRun(recipe, run, stages, metrics)


def write_encoder(path: Path) -> None:
    """Write a random ViT, patch 8 and width 24, as a file that describes itself."""
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0, global_pool="token"
    )
    safetensors.torch.save_file(vit.state_dict(), path, metadata={"patch_size": "8", "num_heads": "3"})


_scene = functools.cache(shapes.scene)


def _write_samples(folder: Path, run: Run, labels: bool) -> None:
    for split, drawn, count in (("train", "train", TRAIN), ("validation", "val", VALIDATION)):
        rows = []
        for index in range(count):
            image, label = _scene(1, drawn, index, SIDE)
            if index == 1:  # not all images are square
                image, label = image[: SIDE // 2], label[: SIDE // 2]
            paths = [folder / f"{split}-{kind}-{index}.png" for kind in ("image", "label")]
            Image.fromarray(image).save(paths[0])
            Image.fromarray(label).save(paths[1])
            rows.append(
                {
                    "index": index,
                    "name": f"scene <{index}>",
                    "image": str(paths[0]),
                    "label": str(paths[1]) if labels else None,
                    "curated": True,
                }
            )
        table = pa.Table.from_pylist(rows, datasets.SCHEMA)
        pq.write_table(table, run.artifact("samples").file(f"{split}.parquet"))


def _train_images(run: Run) -> list[np.ndarray]:
    table = pq.read_table(run.artifact("samples").file("train.parquet"))
    return [images.resize(images.read_image(uri), (SIDE, SIDE)) for uri in table["image"].to_pylist()]


def _write_concepts(run: Run, encoder: Encoder, recipe: Recipe) -> None:
    windows = sliding_windows((SIDE // 8, SIDE // 8), (0.5,), 8)
    rows, features = [], []
    for index, image in enumerate(_train_images(run)):
        crops = crop_windows(torch.from_numpy(image).float(), windows, (32, 32))
        features.append(encoder.class_tokens(normalise(crops.round().to(torch.uint8))))
        rows += [(index, *map(int, window)) for window in windows]
    found = torch.cat(features)
    count = recipe.concepts.count
    centroids = found[torch.linspace(0, len(found) - 1, count).long()]
    distances = torch.cdist(found, centroids)
    near = []
    for concept in range(count):
        for row in distances[:, concept].argsort()[:8].tolist():
            index, y0, y1, x0, x1 = rows[row]
            place = {"y0": y0, "y1": y1, "x0": x0, "x1": x1}
            near.append({"concept": concept, "index": index, **place, "distance": float(distances[row, concept])})
    counts = torch.bincount(distances.argmin(dim=1), minlength=count)
    folder = run.artifact("concepts")
    safetensors.torch.save_file({"centroids": centroids, "counts": counts}, folder.file("concepts.safetensors"))
    pq.write_table(pa.Table.from_pylist(near), folder.file("nearest.parquet"))


def _write_pseudo_labels(run: Run, encoder: Encoder, recipe: Recipe) -> None:
    centroids = safetensors.torch.load_file(run.artifact("concepts").file("concepts.safetensors"))["centroids"]
    batch = normalise(torch.from_numpy(np.stack(_train_images(run))))
    maps = pack_maps(encoder.concept_maps(batch, centroids)).numpy()
    rows = [{"index": i, "maps": m.tobytes(), "h": m.shape[1], "w": m.shape[2]} for i, m in enumerate(maps)]
    for start in (0, 4):
        part = run.artifact("pseudo_labels").file(f"part-{start:08d}.parquet")
        pq.write_table(pa.Table.from_pylist(rows[start : start + 4]), part)


def _write_evaluation(run: Run, recipe: Recipe) -> dict[str, Any]:
    segmenter = Segmenter.load(run.uri)
    table = pq.read_table(run.artifact("samples").file("validation.parquet"))
    confusion = np.zeros((recipe.classes, recipe.classes), dtype=np.int64)
    for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
        # Before it is evaluated a run predicts clusters.
        confusion += confusion_matrix(np.asarray(Image.open(label)), segmenter.predict(image), recipe.classes)
    folder = run.artifact("evaluation")
    safetensors.numpy.save_file({"model": confusion, "last": confusion}, folder.file("confusion.safetensors"))
    found = scores(confusion)
    shown = {
        "mean_iou": found.mean_iou,
        "pixel_accuracy": found.pixel_accuracy,
        "iou": found.iou.tolist(),
        "assignment": found.clusters.tolist(),
    }
    shown["last"] = dict(shown)
    Path(folder.file("scores.json")).write_text(json.dumps(shown))
    return shown
