"""Averages over several sets, as papers report them beside the single ones."""

import dataclasses
from collections.abc import Mapping

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import Published


@dataclasses.dataclass(frozen=True)
class Suite:
    """Averages of a paper.

    Attributes:
      name, title, source: as in `Benchmark`.
      averages: name of an average -> (task, set, metric) of each result that it is the plain mean of.
      published: numbers to compare with; `metric` is the name of an average.
    """

    name: str
    title: str
    source: str
    averages: Mapping[str, tuple[tuple[str, str, str], ...]]
    published: tuple[Published, ...]

    def of(self, values: Mapping[tuple[str, str, str], float]) -> dict[str, float]:
        """The averages of which all members are among the values, which have (task, set, metric) as keys."""
        return {
            name: sum(values[member] for member in members) / len(members)
            for name, members in self.averages.items()
            if all(member in values for member in members)
        }


GROUP_SCORES = ("winoground", "eqben")
RETRIEVAL = ("coco_karpathy_test", "flickr30k_test", "coco_counterfactuals_retrieval")
PAPER = "FSC-CLIP, paper"
# Comp, I2T, T2I in percent.
ROWS = {
    (compositional.CLIP, PAPER): (46.1, 60.0, 45.8),
    ("NegCLIP COCO ViT-B/32 (the authors' own)", PAPER): (53.1, 66.1, 57.9),
    ("NegCLIP LAION-COCO ViT-B/32 (the authors' own)", PAPER): (53.5, 52.3, 54.1),
    ("FSC-CLIP COCO ViT-B/32", compositional.FSC_CLIP): (54.15, 66.26, 58.32),
    ("FSC-CLIP LAION-COCO ViT-B/32", compositional.FSC_CLIP): (53.46, 58.18, 55.50),
    ("FSC-CLIP LoRA LAION-COCO ViT-B/32", compositional.FSC_CLIP): (54.20, 57.27, 54.32),
}

SUITES = (
    # Its third one, ZS, is the mean over the 21 sets of ELEVATER, of which Hateful Memes is not among ours.
    Suite(
        name="fsc_clip",
        title="Averages of FSC-CLIP's paper",
        source="https://arxiv.org/abs/2410.05210",
        averages={
            "Comp": tuple(
                ("choice", name, "group_score" if name in GROUP_SCORES else "accuracy") for name in compositional.SETS
            ),
            "I2T": tuple(("retrieval", name, "image_to_text_R@1") for name in RETRIEVAL),
            "T2I": tuple(("retrieval", name, "text_to_image_R@1") for name in RETRIEVAL),
        },
        published=tuple(
            Published(model, metric, round(value / 100, 6), source, "global")
            for (model, source), row in ROWS.items()
            for metric, value in zip(("Comp", "I2T", "T2I"), row, strict=True)
        ),
    ),
)
