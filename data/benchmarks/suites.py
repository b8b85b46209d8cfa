"""Averages over several sets, as papers report them beside the single ones."""

import dataclasses
from collections.abc import Mapping

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import Published

Member = tuple[str, str, str]  # task, set, metric


@dataclasses.dataclass(frozen=True)
class Suite:
    """Averages of a paper.

    Attributes:
      name, title, source: as in `Benchmark`.
      averages: name of an average -> (task, set, metric) of each result that it is the plain mean of. Of a set that may
        lie there in two forms both names are given, "a|b": the first one that was evaluated counts.
      published: numbers to compare with; `metric` is the name of an average.
      notes: by name of an average, what differs from the paper's.
    """

    name: str
    title: str
    source: str
    averages: Mapping[str, tuple[Member, ...]]
    published: tuple[Published, ...]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def members(self, values: Mapping[Member, float]) -> dict[str, list[Member]]:
        """The averages of which all members are among the values, which have (task, set, metric) as keys: these."""
        found = {}
        for name, members in self.averages.items():
            there = [[one for one in either(member) if one in values] for member in members]
            if all(there):
                found[name] = [first for first, *_ in there]
        return found


def either(member: Member) -> list[Member]:
    """The results that a member of an average may be."""
    task, names, metric = member
    return [(task, name, metric) for name in names.split("|")]


GROUP_SCORES = ("winoground", "eqben")
RETRIEVAL = ("coco_karpathy_test", "flickr30k_test", "coco_counterfactuals_retrieval")
# The 21 classification sets of ELEVATER (Li et al., NeurIPS 2022) with their metrics, as FSC-CLIP's table 9 has them.
ELEVATER = (
    ("wds_vtab-caltech101|caltech101", "mean_per_class"),
    ("wds_vtab-cifar10|cifar10", "acc1"),
    ("wds_vtab-cifar100|cifar100", "acc1"),
    ("wds_country211|country211", "acc1"),
    ("wds_vtab-dtd|dtd", "acc1"),
    ("wds_vtab-eurosat|eurosat", "acc1"),
    ("wds_fer2013", "acc1"),
    ("wds_fgvc_aircraft|aircraft", "mean_per_class"),
    ("wds_vtab-flowers|flowers102", "mean_per_class"),
    ("wds_food101|food101", "acc1"),
    ("wds_gtsrb|gtsrb", "acc1"),
    ("hateful_memes", "roc_auc"),
    ("wds_imagenet1k|imagenet", "acc1"),
    ("wds_vtab-kitti_closest_vehicle_distance", "acc1"),
    ("wds_mnist", "acc1"),
    ("wds_vtab-pets|pets", "mean_per_class"),
    ("wds_vtab-pcam", "acc1"),
    ("wds_renderedsst2|rendered_sst2", "acc1"),
    ("wds_vtab-resisc45|resisc45", "acc1"),
    ("wds_cars|cars", "acc1"),
    ("wds_voc2007_multilabel|voc2007", "voc_11_point_map"),
)
PAPER = "FSC-CLIP, paper"
AVERAGES = ("Comp", "ZS", "I2T", "T2I")
ROWS = {  # AVERAGES in percent
    (compositional.CLIP, PAPER): (46.1, 57.1, 60.0, 45.8),
    ("OpenAI CLIP ViT-B/16", PAPER): (46.2, 60.3, 62.9, 49.0),
    ("NegCLIP COCO ViT-B/32 (the authors' own)", PAPER): (53.1, 55.1, 66.1, 57.9),
    ("NegCLIP LAION-COCO ViT-B/32 (the authors' own)", PAPER): (53.5, 54.1, 52.3, 54.1),
    ("FSC-CLIP COCO ViT-B/32", compositional.FSC_CLIP): (54.15, 55.68, 66.26, 58.32),
    ("FSC-CLIP LAION-COCO ViT-B/32", compositional.FSC_CLIP): (53.46, 55.33, 58.18, 55.50),
    ("FSC-CLIP LoRA LAION-COCO ViT-B/32", compositional.FSC_CLIP): (54.20, 55.91, 57.27, 54.32),
}

SUITES = (
    Suite(
        name="fsc_clip",
        title="Averages of FSC-CLIP's paper",
        source="https://arxiv.org/abs/2410.05210",
        averages={
            "Comp": tuple(
                ("choice", name, "group_score" if name in GROUP_SCORES else "accuracy") for name in compositional.SETS
            ),
            "ZS": tuple(("classification", *member) for member in ELEVATER),
            "I2T": tuple(("retrieval", name, "image_to_text_R@1") for name in RETRIEVAL),
            "T2I": tuple(("retrieval", name, "text_to_image_R@1") for name in RETRIEVAL),
        },
        published=tuple(
            Published(model, metric, round(value / 100, 6), source, "global")
            for (model, source), row in ROWS.items()
            for metric, value in zip(AVERAGES, row, strict=True)
        ),
        notes={
            "ZS": "ZS is taken over other images than the paper's in four sets: it has 6,084 of Caltech-101, 5,000 of "
            "EuroSAT, 3,589 of FER2013 and 25,200 of RESISC45."
        },
    ),
)
