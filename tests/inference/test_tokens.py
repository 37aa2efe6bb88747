import pytest
import torch

from transfgu.inference.tokens import PatchTokens
from transfgu.recipe import EncoderRecipe


@pytest.mark.parametrize("images", [1, 2, 7])
def test_cores_that_share_a_batch_change_nothing(images: int) -> None:
    encode = PatchTokens(EncoderRecipe(name="vit_shapes", weights="random"), torch.device("cpu"))
    batch = torch.randint(0, 256, (images, 3, 32, 48), dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = encode(batch)
        torch.set_num_threads(3)
        shared = encode(batch)
        assert torch.get_num_threads() == 3  # what one of them asks for holds for itself
    finally:
        torch.set_num_threads(before)
    assert alone.shape == (images, 4 * 6, encode.encoder.width)
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)
    assert not shared.requires_grad
