"""What each number of the diagnostics is, in the words of the report."""

from __future__ import annotations

from typing import Any

from nemo_pre.report.markup import percent, text

FEW = 10  # tokens a dimension, below which covariances are badly known

Results = dict[str, Any]

# name in the results, title, definition
MEASURES = (
    (
        "pairwise_cosine",
        "Cosine of two visual tokens",
        "Mean cosine of two different visual tokens of one image, averaged over images: near 1 where all patches look "
        "alike (homogenisation; LaVer, arXiv 2512.06281).",
    ),
    (
        "cohesion",
        "Cohesion",
        "Mean cosine of two different tokens of one class, averaged over its pairs, then over the image's classes "
        "with at least two tokens, then over images (PRe, arXiv 2603.20808, eq. 3).",
    ),
    (
        "coupling",
        "Coupling",
        "Mean cosine of two tokens of different classes, averaged over the pairs of two classes, then over the pairs "
        "of classes, then over images (eq. 4).",
    ),
    (
        "contrast",
        "Contrast ratio",
        "Cohesion / coupling, of the two means over images (eq. 5). Without value where coupling is not above 1e-6: "
        "the ratio is unstable near 0.",
    ),
    (
        "contrast_difference",
        "Cohesion - coupling",
        "The same contrast as a difference, which is stable where coupling is near 0.",
    ),
    (
        "effective_dimension",
        "Effective dimension",
        "The fewest principal components that hold 95% of the centred variance of all visual tokens of all images "
        "(eq. 6).",
    ),
    (
        "redundancy",
        "Redundancy",
        "Mean absolute Pearson correlation of two different dimensions of the visual tokens (eq. 7); a dimension "
        "without variance is left out.",
    ),
    (
        "cka_to_layer_0",
        "Linear CKA to layer 0",
        "Linear centred kernel alignment of the layer's visual tokens with those that enter the decoder: 1 where they "
        "are the same up to rotation, scale and shift (arXiv 1905.00414).",
    ),
    (
        "length",
        "Length of a visual token",
        "Root mean square of the Euclidean lengths. What a layer adds shows little in tokens much longer than that.",
    ),
    (
        "distance_to_layer_0",
        "Distance to layer 0",
        "Root mean square distance of a visual token from itself as it enters the decoder, in lengths of those that "
        "enter.",
    ),
    (
        "attention_to_visual",
        "Attention of text to visual tokens",
        "Share of the attention of the text behind the image that goes to its visual tokens: summed over them, "
        "averaged over those text tokens, heads and images.",
    ),
)
PROBES = {
    "presence": ("Linear probe for classes", "which classes the mask holds, the mean over classes of right decisions"),
    "count": ("Linear probe for the number of objects", "how many objects the scene shows"),
    "label": ("Linear probe for the label", "the class in the records"),
}


def definitions(results: Results) -> str:
    entries = [(title, told) for _, title, told in MEASURES]
    last = results["layers"][-1]["probe"]
    for task in results["data"]["probe_tasks"]:
        frequent = last.get(task["name"], {}).get("most_frequent")
        beside = (
            f" Always giving the most frequent answer is right {percent(frequent)} of the time." if frequent else ""
        )
        title, told = PROBES[task["name"]]
        entries.append((title, f"What a linear map reads off the mean visual token of an image: {told}.{beside}"))
    if results["data"]["probe_tasks"]:
        entries.append(
            (
                "How probes are fitted",
                "Ridge regression of indicators with an intercept on the train split; the penalty is alpha times the "
                "mean variance of the features, alpha from 1e-6 to 100 with the smallest squared error in 5-fold "
                "cross-validation. Accuracy is on the val split; thin lines and brackets are Wilson's 95% interval "
                "for as many answers as images.",
            )
        )
    entries += [
        (
            "What a patch shows",
            "The mask is cut and resized as the picture is, without interpolation. A patch less than half of which is "
            "labelled belongs to nothing; any other to the object that covers most of it, if that is at least 25% of "
            "its labelled pixels, else to the background where the data have one, else to nothing. Cohesion, coupling "
            "and contrast are over the images with two classes, one of them with two patches.",
        ),
        ("How many tokens that takes", _enough(results)),
        (
            "Logit lens",
            "The most likely next token at each visual token of the last layer, after final norm and head.",
        ),
    ]
    items = "".join(f"<dt>{text(title)}</dt><dd>{text(told)}</dd>" for title, told in entries)
    return f'<div class="block"><dl class="definitions">{items}</dl></div>'


def _enough(results: Results) -> str:
    """Covariances of few tokens look thinner and more correlated than they are."""
    layer = results["layers"][-1]
    tokens, width = layer["visual_tokens"], layer["width"]
    told = (
        f"Effective dimension, redundancy and CKA are of {tokens:,} tokens of {width:,} dimensions. Few tokens make "
        "the first too small and the others too large, so compare models at the same images, tokens and width."
    )
    return told if tokens >= FEW * width else f"{told} Fewer than {FEW} tokens a dimension are few: take more images."
