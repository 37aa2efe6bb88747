"""TransFGU on Ray: semantic segmentation learned without a single label.

Importing the package costs nothing: what it exports is loaded when it is first asked for, and never Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfgu.segmenter import Segmenter

__version__ = "0.1.0"
__all__ = ["Segmenter", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Segmenter":
        from transfgu.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
