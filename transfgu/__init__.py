"""TransFGU on Ray: semantic segmentation learned without labels.

Importing the package is fast: each export is loaded on first use, and none of them loads Ray. The version is that in
`pyproject.toml`, read from the installed package's metadata.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfgu.segmenter import Segmenter

    __version__: str

__all__ = ["Segmenter", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Segmenter":
        from transfgu.segmenter import Segmenter

        return Segmenter
    if name == "__version__":
        from importlib import metadata

        return metadata.version(__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
