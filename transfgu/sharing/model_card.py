"""Write the model card of a shared model from the run's recipe and scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from transfgu import datasets
from transfgu.methods import method
from transfgu.recipe import Recipe

PAPER = "https://arxiv.org/abs/2112.01515"

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Divides an image into {{ classes|length }} classes.
{% if recipe.method == "transfgu" -%}
It was learned without labels, by TransFGU
([Yin et al., ECCV 2022]({{ paper }})): windows of unlabelled images were described by the self-supervised vision
transformer `{{ recipe.encoder.name }}` and clustered into {{ recipe.concepts.count }} concepts; a mask decoder learned
from concept maps of the training images, and then from its own predictions.
{% else -%}
It was learned without labels, by {{ method.title }}.
{{ method.about }}
{% endif %}

## Use

```python
from transfgu import Segmenter

segmenter = Segmenter.from_pretrained("OWNER/NAME")  # this repository's name, or a folder
mask = segmenter.predict("photo.jpg")  # (H, W) class indices
segmenter.classes[mask[0, 0]]
```

Images are resized to {{ recipe.dataset.image_size[0] }} x {{ recipe.dataset.image_size[1] }} pixels (height x width);
masks have the size of the original image.

## Scores

{% if scores -%}
On the validation images of `{{ recipe.preset }}`: mIoU {{ "%.2f"|format(scores.mean_iou) }} %, pixel accuracy
{{ "%.2f"|format(scores.pixel_accuracy) }} %. Labels were used only to compute the scores, to match each cluster to one
class, and to choose the best epoch; the model was trained without them.

| index | class | IoU, % |
| --- | --- | --- |
{% for name, iou in rows -%}
| {{ loop.index0 }} | {{ name }} | {{ "absent" if iou is none else "%.1f"|format(iou) }} |
{% endfor %}
{%- elif named -%}
There were no labels to score with. The classes were named by a person.
{% else -%}
There were no labels to score with, so classes are numbered: look at predictions to find out what each one shows.
{% endif %}
{%- if not scores or regrouped %}
{% if regrouped %}Predictions have these classes, which a person named and merged after the scores were computed:
{% endif %}
| index | class |
| --- | --- |
{% for name in classes -%}
| {{ loop.index0 }} | {{ name }} |
{% endfor %}
{%- endif %}

## Limits

Classes are clusters of what the encoder finds similar, so a class may contain more or less than its name says. Masks
have the resolution of the encoder's patches. The encoder's weights are included and have their own licence.

## Recipe

```yaml
{{ yaml }}```
"""


def write_card(
    recipe: Recipe, classes: Sequence[str], scores: Mapping[str, Any] | None, *, named: bool = False
) -> ModelCard:
    """Return the card of a run's model.

    Args:
        recipe: recipe of the run; the location of its data is not written into the card.
        classes: names of the classes of predictions.
        scores: `mean_iou`, `pixel_accuracy` and `iou` by class (percent) of the run; None, or a mean_iou of None, means
            that there are no scores.
        named: True if the user named classes, and possibly merged some.
    """
    scored = scores if scores is not None and scores["mean_iou"] is not None else None
    scored_names = datasets.classes(recipe).names
    regrouped = scored is not None and len(classes) != len(scored_names)
    how = method(recipe.method)
    title = f"{how.title}, {recipe.preset}"
    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=recipe.preset,
            dataset_name=recipe.preset,
            dataset_split="validation",
            metric_type=metric,
            metric_value=round(scored[metric], 2),
        )
        for metric in ("mean_iou", "pixel_accuracy")
        if scored is not None
    ]
    data = ModelCardData(
        library_name="transfgu",
        pipeline_tag="image-segmentation",
        tags=["unsupervised-semantic-segmentation", "transfgu"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    shown = recipe.with_fields({"data": "", "labels": "", "encoder.weights": "pretrained", "decoder.weights": ""})
    made: ModelCard = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        method=how,
        paper=PAPER,
        recipe=recipe,
        classes=classes,
        scores=scored,
        rows=[] if scored is None else list(zip(scored_names if regrouped else classes, scored["iou"], strict=True)),
        named=named,
        regrouped=regrouped,
        yaml=shown.to_yaml(),
    )
    return made
