"""ARO (Yuksekgonul et al., ICLR 2023): relations and attributes of Visual Genome, and the order of words."""

import collections
import pathlib

from flair_jax.data.benchmarks import compositional
from flair_jax.data.benchmarks.base import AnnotationError, Benchmark, Choice, Published, find_folder, inside
from flair_jax.data.benchmarks.compositional import COCO_VAL2014, Builder, box_of, texts_of
from flair_jax.data.benchmarks.json_files import field, read_json, typed

FLICKR_IMAGES = "flickr30k/flickr30k-images|flickr30k/images|flickr30k/flickr30k_images|flickr30k-images"
FILES = {
    "VG_Relation": "aro/visual_genome_relation.json",
    "VG_Attribute": "aro/visual_genome_attribution.json",
    "COCO_Order": "aro/coco_order.json",
    "Flickr30k_Order": "aro/flickr30k_order.json",
}
SIZES = {"VG_Relation": 23_937, "VG_Attribute": 28_748, "COCO_Order": 25_010, "Flickr30k_Order": 5_000}  # rows
MIN_ATTRIBUTES = 25  # items of a pair of attributes; rarer ones do not count
# Relations that the authors leave out of their average; most of them are symmetric (notebook of the repository).
_NAMES = (
    "adjusting|attached to|between|bigger than|biting|boarding|brushing|chewing|cleaning|climbing|close to|"
    "coming from|coming out of|contain|crossing|dragging|draped over|drinking|drinking from|driving|driving down|"
    "driving on|eating from|eating in|enclosing|exiting|facing|filled with|floating in|floating on|flying|"
    "flying above|flying in|flying over|flying through|full of|going down|going into|going through|grazing in|"
    "growing in|growing on|guiding|hanging from|hanging in|hanging off|hanging over|higher than|holding onto|"
    "hugging|in between|jumping off|jumping on|jumping over|kept in|larger than|leading|leaning over|leaving|"
    "licking|longer than|looking in|looking into|looking out|looking over|looking through|lying next to|"
    "lying on top of|making|mixed with|mounted on|moving|on the back of|on the edge of|on the front of|"
    "on the other side of|opening|painted on|parked at|parked beside|parked by|parked in|parked in front of|"
    "parked near|parked next to|perched on|petting|piled on|playing|playing in|playing on|playing with|pouring|"
    "reaching for|reading|reflected on|riding on|running in|running on|running through|seen through|"
    "sitting behind|sitting beside|sitting by|sitting in front of|sitting near|sitting next to|sitting under|"
    "skiing down|skiing on|sleeping in|sleeping on|smiling at|sniffing|splashing|sprinkled on|stacked on|"
    "standing against|standing around|standing behind|standing beside|standing in front of|standing near|"
    "standing next to|staring at|stuck in|surrounding|swimming in|swinging|talking to|topped with|touching|"
    "traveling down|traveling on|tying|typing on|underneath|wading in|waiting for|walking across|walking by|"
    "walking down|walking next to|walking through|working in|working on|worn on|wrapped around|wrapped in|by|of|"
    "near|next to|with|beside|on the side of|around"
)
EXCLUDED = frozenset(_NAMES.split("|"))


def read(root: pathlib.Path) -> Choice:
    """Relations and attributes: a crop, the true and the false caption. Order: an image, its caption and shuffled ones.

    ARO shuffles captions at random when it loads them (with spaCy and NLTK). `coco_order.json` and
    `flickr30k_order.json` are the `test_cases` of its classes `COCO_Order` and `Flickr30k_Order`, written once with
    `json.dump`: a list of {image, caption_options: [true one, four others]}.
    """
    flickr = find_folder(root, FLICKR_IMAGES)
    coco = find_folder(root, COCO_VAL2014)

    def add(builder: Builder, part: str, file: pathlib.Path) -> None:
        rows = typed(read_json(file), list, str(file))
        if part.endswith("Order"):
            for number, row in enumerate(rows):
                where = f"{file}[{number}]"
                name = field(row, "image", str, where).rpartition("/")[2]
                texts = texts_of(field(row, "caption_options", list, where), f"{where}: 'caption_options'")
                if len(texts) < 2:
                    raise AnnotationError(f"{where}: one caption; expected the true one and others")
                builder.add([inside(coco if part.startswith("COCO") else flickr, name, file)], texts, group=part)
            return
        pairs = [_pair(row, part, f"{file}[{number}]") for number, row in enumerate(rows)]
        sizes = collections.Counter(pairs)
        for number, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
            if pair in EXCLUDED if part == "VG_Relation" else sizes[pair] < MIN_ATTRIBUTES:
                continue
            where = f"{file}[{number}]"
            box = box_of(*(row.get(f"bbox_{side}") for side in "xywh"), where)
            name = field(row, "image_path", str, where)
            picture = compositional.visual_genome(root, name, file, "aro/images", box=box)
            texts = [field(row, key, str, where) for key in ("true_caption", "false_caption")]
            builder.add([picture], texts, group=f"{part}/{pair.replace('/', ' ')}", place=1)  # false ones come first

    return compositional.read_parts(root, FILES, add)


def _pair(row: dict, part: str, where: str) -> str:
    """The relation, or the two attributes, that an item is about."""
    if part == "VG_Relation":
        return field(row, "relation_name", str, where)
    return "_".join(texts_of(field(row, "attributes", list, where), f"{where}: 'attributes'"))


BENCHMARKS = (
    Benchmark(
        name="aro",
        task="choice",
        title="ARO",
        files=compositional.files(FILES, SIZES, "aro/images", FLICKR_IMAGES, COCO_VAL2014),
        read=read,
        licence="MIT; images: Visual Genome, COCO, Flickr30k",
        source="https://github.com/mertyg/vision-language-models-are-bows",
        published=(
            *compositional.published("aro"),
            *(
                Published(compositional.CLIP, f"accuracy/{part}", value, compositional.VL_COMPO, "global")
                for part, value in {
                    "VG_Relation": 0.5990,
                    "VG_Attribute": 0.6320,
                    "Flickr30k_Order": 0.5956,
                    "COCO_Order": 0.4756,
                }.items()
            ),
        ),
    ),
)
