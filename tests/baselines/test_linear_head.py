"""Softmax regression on tokens that determine their pseudo labels."""

from collections.abc import Iterator

import pytest
import torch

from tests.baselines.learning import recipe_of, setting
from transfgu.baselines.linear_head import LinearHead, load_models
from transfgu.datasets.packed_maps import pack_maps
from transfgu.learner import Batch


def test_it_learns_the_labels_of_the_maps() -> None:
    recipe = recipe_of("linear-head", lr=0.1)
    learner = LinearHead(setting(recipe))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 16, learner.model.encode.encoder.width, generator=generator)  # type: ignore[attr-defined]
    labels = tokens[:, :, :4].argmax(2)  # (B, hw)
    maps = torch.nn.functional.one_hot(labels, 4).mT.reshape(4, 4, 4, 4).float() + 0.1
    batch = Batch(torch.arange(4).numpy(), tokens, pack_maps(maps))

    def batches() -> Iterator[Batch]:
        yield batch

    learner.begin(0, batches)
    losses = [learner.step(batch, 0, index)()["total"] for index in range(60)]
    assert losses[0] == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-5)  # of zeros: chance
    assert losses[-1] < 0.2 * losses[0]
    (model,) = load_models(recipe, [learner.model.state_dict()], torch.device("cpu"))
    found = model.logits(tokens, (32, 32)).argmax(1).flatten(1)
    assert (found == labels).float().mean() > 0.95
