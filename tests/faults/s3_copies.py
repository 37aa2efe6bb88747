"""Copy runs to a bucket and back."""

from pathlib import Path

from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.artifacts import Run


def on_s3(recipe: Recipe, s3: str) -> Recipe:
    """Return the recipe with its data and encoder in the bucket."""
    source = Path(recipe.data).parent
    for file in [*source.glob("images/*"), *source.glob("labels/*"), source / "encoder.safetensors"]:
        storage.write_bytes(storage.join(s3, str(file.relative_to(source))), file.read_bytes())
    places = {"data": "images", "labels": "labels", "encoder.weights": "encoder.safetensors"}
    return recipe.with_fields({field: storage.join(s3, name) for field, name in places.items()})


def fetched(s3: str, folder: Path) -> Run:
    """Copy the run to this machine's disk."""
    prefix = storage.join(s3, "run")
    for uri in storage.list_files(prefix):
        target = folder / uri.removeprefix(prefix + "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read_bytes(uri))
    return Run(str(folder))
