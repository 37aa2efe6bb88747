"""The suite runs with every signature of the library checked, whatever decorates them."""

import jaxtyping
import numpy as np
import pytest

from transfgu.windows import select_windows, sliding_windows


def test_a_wrong_shape_or_type_is_refused() -> None:
    saliency = np.zeros((2, 2), bool)
    with pytest.raises(jaxtyping.TypeCheckError, match="windows"):
        select_windows(np.zeros((3, 3), int), saliency, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="scales"):
        sliding_windows((4, 4), "half")  # type: ignore[arg-type]
    assert select_windows(np.zeros((3, 4), int), saliency, 4)
