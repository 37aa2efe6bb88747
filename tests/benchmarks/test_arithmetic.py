"""The bounds count operations correctly, by hand."""

from pathlib import Path

import pytest
import torch

from tests.made_run import write_encoder
from transfgu.benchmarks.arithmetic import Bare, faiss_kmeans, made_features
from transfgu.recipe import Recipe, preset

SIDE, D, DEPTH, PATCH = 64, 24, 2, 8


def tiny_recipe(folder: Path) -> Recipe:
    write_encoder(folder / "encoder.safetensors")
    return preset("coco-stuff-27").with_fields(
        {
            "encoder.name": "tiny",
            "encoder.weights": str(folder / "encoder.safetensors"),
            "image_size": (SIDE, SIDE),
            "feature_size": (2 * SIDE, 2 * SIDE),
            "training_size": (SIDE, SIDE),
            "windows.size": (32, 32),
            "windows.scales": (0.5,),
            "things": 3,
            "stuff": 2,
        }
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    return Bare(tiny_recipe(tmp_path_factory.mktemp("bare")))


def forward_operations(side: int) -> int:
    """A plain ViT: the patches' projection; in each block four d x d and two d x 4 d products, and attention."""
    patches = (side // PATCH) ** 2
    n = patches + 1
    return 2 * patches * 3 * PATCH**2 * D + DEPTH * (2 * n * 12 * D**2 + 2 * 2 * n**2 * D)


def test_operations_of_a_forward_are_those_of_the_formula(bare: Bare) -> None:
    seconds, operations = bare.forwards({(64, 64): 3, (32, 32): 5})
    assert operations == 3 * forward_operations(64) + 5 * forward_operations(32)
    assert seconds > 0
    assert bare.shape() == (D, 3, PATCH)
    assert bare.about()["matmul_flops"] > 1e8


def test_counting_is_timed(bare: Bare) -> None:
    assert bare.counting(2) > 1


def test_maps_are_timed_beside_a_forward_and_the_published_way(bare: Bare) -> None:
    found = bare.concept_maps(2, unfused=True)
    assert found.flops == found.items * forward_operations(SIDE)
    assert len(found.ours) == len(found.bound) == 2
    assert found.details["times as long as ours"] > 0
    assert all(block.attn.fused_attn for block in bare.frozen.encoder.vit.blocks)  # it used a copy
    assert not any(p.requires_grad for p in bare.frozen.encoder.parameters())


def test_a_training_step_holds_the_forward_that_it_is_measured_by(bare: Bare) -> None:
    found = bare.training_step(2, 1)
    assert found.flops > 2 * forward_operations(SIDE // 2)  # views have half the side
    assert found.peak_bytes > 2**20
    assert bare.training_loop(2, 2) > 0


def test_kmeans_and_faiss_find_as_good_clusters(bare: Bare) -> None:
    found = bare.concepts(3000, 20, 1)
    assert found.items == 60_000
    assert found.details["inertia, ours by FAISS's"] == pytest.approx(1, abs=1e-3)
    features = made_features(3000, D)
    _, inertia = faiss_kmeans(features, features[:5], 20)
    assert inertia > 0
    assert torch.get_num_threads() >= 1
