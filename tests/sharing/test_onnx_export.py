"""The exported graphs against PyTorch, from pixels to class logits, with other sizes and batches than in the export."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.made_run import SIDE, make_run
from tests.refusals import refused
from transfgu.segmenter import Segmenter

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.long  # torch takes ten seconds to write a graph
@pytest.mark.parametrize("size", [(SIDE, SIDE), (40, 96), (128, 64)])
def test_graphs_give_what_pytorch_gives(tmp_path: Path, size: tuple[int, int]) -> None:
    segmenter = Segmenter.load(make_run(tmp_path).run.uri, device="cpu")
    encoder, decoder = segmenter.export_onnx(tmp_path / "onnx", size=size)
    encode, decode = (onnxruntime.InferenceSession(file) for file in (encoder, decoder))
    for count in (1, 3):
        images = np.random.default_rng(count).integers(0, 256, (count, 3, *size), dtype=np.uint8)
        (patches,) = encode.run(None, {"images": images})
        (logits,) = decode.run(None, {"patches": patches})
        with torch.inference_mode():
            expected = segmenter.encode(torch.from_numpy(images))
            clusters = segmenter.decoder(expected)[0].numpy()
        assert logits.shape == (count, size[0] // 8 * size[1] // 8, 10)
        np.testing.assert_allclose(patches, expected.numpy(), atol=1e-4)
        for cluster, index in enumerate(segmenter.class_of):
            np.testing.assert_allclose(logits[:, :, index], clusters[:, :, cluster], atol=1e-4)


def test_a_size_that_the_patch_does_not_divide(tmp_path: Path) -> None:
    segmenter = Segmenter.load(make_run(tmp_path).run.uri, device="cpu")
    with refused("image-size 60 8"):
        segmenter.export_onnx(tmp_path / "onnx", size=(64, 60))
