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
It was learned without a single label, by TransFGU
([Yin et al., ECCV 2022]({{ paper }})): windows of unlabelled images were described by the self-supervised vision
transformer `{{ recipe.encoder.name }}` and clustered into {{ recipe.concepts.count }} concepts; a mask decoder learned
from maps of where each concept is, and then from its own predictions.
{% else -%}
It was learned without a single label, by {{ method.title }}.
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
masks come back at the image's own size.

## Scores

{% if scores -%}
On the validation images of `{{ recipe.preset }}`: mIoU {{ "%.2f"|format(scores.mean_iou) }} %, pixel accuracy
{{ "%.2f"|format(scores.pixel_accuracy) }} %. Labels scored it, matched each cluster to one class, and told the best
epoch; nothing was learned from them.

| index | class | IoU, % |
| --- | --- | --- |
{% for name, iou in rows -%}
| {{ loop.index0 }} | {{ name }} | {{ "absent" if iou is none else "%.1f"|format(iou) }} |
{% endfor %}
{%- elif named -%}
There were no labels to score with. A person looked at the classes and named them.
{% else -%}
There were no labels to score with, so classes are numbered: look at predictions to see what each one is.
{% endif %}
{%- if not scores or regrouped %}
{% if regrouped %}Predictions are in these classes, which a person named and merged after the scores were counted:
{% endif %}
| index | class |
| --- | --- |
{% for name in classes -%}
| {{ loop.index0 }} | {{ name }} |
{% endfor %}
{%- endif %}

## Limits

Classes are clusters of what the encoder finds similar, which may not be what their names promise. Masks have the
resolution of the encoder's patches. The encoder's weights lie beside the decoder's, under their own licence.

## Recipe

```yaml
{{ yaml }}```
"""


def write_card(
    recipe: Recipe, classes: Sequence[str], scores: Mapping[str, Any] | None, *, named: bool = False
) -> ModelCard:
    """The card of a run's model.

    Args:
        recipe: the run's; of where its data lies the card says nothing.
        classes: names of the classes that predictions are in.
        scores: `mean_iou`, `pixel_accuracy` and `iou` by class (percent) of the run; None, or a mean_iou of None: none.
        named: the user gave names to classes, and may have merged some.
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
