"""Evaluators: each is built from a model and its data, and its `run(params)` yields `report.Result`s.

They know a model by its contract alone: `encode_image`, `encode_text`, `score`, `context_length`, `has_pooling`,
`has_regions`, and the methods that they name. They take their data as plain arrays and sequences: reading files is not
their business.
"""

from flair_jax.evaluators.choice import Choice, ChoiceSet, WholeImages
from flair_jax.evaluators.classification import Classification, ClassificationSet
from flair_jax.evaluators.pointing import Pointing, PointingSet
from flair_jax.evaluators.regions import Regions
from flair_jax.evaluators.retrieval import Retrieval, RetrievalSet
from flair_jax.evaluators.segmentation import Segmentation, SegmentationSet

__all__ = [
    "Choice",
    "ChoiceSet",
    "Classification",
    "ClassificationSet",
    "Pointing",
    "PointingSet",
    "Regions",
    "Retrieval",
    "RetrievalSet",
    "Segmentation",
    "SegmentationSet",
    "WholeImages",
]
