"""Every key of a run with the defaults of FLAIR's recipe. A config starts from here and says what differs."""

import math

from ml_collections import ConfigDict, config_dict

from flair_jax.configs import variants

DREAMLIP_FIELDS = (
    "raw_caption",
    "shortIB_captions",
    "longIB_captions",
    "shortSV_captions",
    "longSV_captions",
    "shortLLA_captions",
    "longLLA_captions",
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the data, the crops and all draws
    config.batch_size = 128  # images per step, over all devices
    config.steps = config_dict.placeholder(int)  # length of the run: this …
    config.epochs = config_dict.placeholder(float)  # … or this
    config.init_from = config_dict.placeholder(str)  # weights to start from: a workdir, .safetensors or .pt
    config.init_partial = False  # True: take what fits of another model, initialise the rest, and print which is which
    config.init_resized = False  # True: of the same model for other images or texts, with resized position embeddings
    config.log_every = 10  # steps, as all of these
    config.save_every = 1000
    config.keep = 2  # newest checkpoints that stay …
    config.keep_every = config_dict.placeholder(int)  # … beside those of every so many steps, which stay for ever
    config.eval_every = 0  # 0: only at the end; an evaluator may have an `every` of its own
    config.evaluate_before = False  # True: evaluate the weights at the start, too, and compare them with the end
    # Ends the run when a metric no longer improves, and keeps the best checkpoint in WORKDIR/best: {"evaluator": "val",
    # "metric": "retrieval/val/global/text_to_image_R@1", "patience": 3}; see EarlyStoppingOptions, early_stopping.py.
    config.early_stopping = config_dict.placeholder(object)
    config.profile_steps = config_dict.placeholder(tuple)  # (first, last): a trace for XProf in WORKDIR/profile
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))  # -1: all devices

    config.model = variants.flair("B/16")
    # Trains low-rank changes of the weights instead of them, such as {"rank": 4}; see LoraOptions in flair_jax/lora.py.
    config.lora = config_dict.placeholder(object)

    config.objectives = variants.flair_objectives()  # the loss: sum of weight * objective, see flair_jax/objectives

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.first_learning_rate = config_dict.placeholder(float)  # of step 0; None: the peak / warmup_steps
    config.optimizer.last_learning_rate = 0.0
    config.optimizer.weight_decay = 0.5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = config_dict.placeholder(float)
    # (pattern of parameter names, what holds for them), such as ("vision/.*", {"frozen": True, "lr_scale": 0.1,
    # "decay": False}); the first pattern that matches counts. Unless told otherwise what has two axes or more decays.
    config.optimizer.rules = ()
    config.optimizer.clamp = (("logit_scale", 0.0, math.log(100)),)  # (pattern, lowest, highest), after each step

    # Decay of a moving average of the parameters, such as 0.9999, which is then what is evaluated and loaded.
    config.ema_decay = config_dict.placeholder(float)  # None: no average

    config.data = ConfigDict()
    # Tars, ArrayRecord, TFRecord or TFDS: "/data/{00000..00575}.tar", a folder, "gs://…", "tfds:…", "one::another".
    config.data.shards = config_dict.placeholder(str)
    config.data.weights = config_dict.placeholder(tuple)  # how often each set of "one::another" comes; None: all once
    config.data.shuffle_window = config_dict.placeholder(int)  # samples, for slow stores; None: the whole epoch
    config.data.captions = ConfigDict()  # see CaptionOptions in data/transforms/captions.py
    config.data.captions.fields = DREAMLIP_FIELDS
    config.data.captions.splitting = "every_stop"  # of one string; "sentences" knows abbreviations, "whole" splits not
    config.data.captions.join_fields = False  # True: each field is one text, however many sentences it holds
    config.data.captions.first = config_dict.placeholder(int)  # sentences to draw from; None: all
    config.data.captions.count = 8  # K, captions per image
    config.data.captions.min_merged = 1  # sentences a caption
    config.data.captions.max_merged = 3
    config.data.captions.merging = "mixed"  # or "consecutive", "scattered"
    config.data.captions.reference_windows = True
    # Hard negatives of an image's first caption, one of each kind where there is one; see data/transforms/negatives.py.
    config.data.negatives = ConfigDict()
    config.data.negatives.kinds = config_dict.placeholder(tuple)  # such as ("negclip", "replace", "ngram_shuffle_2")
    config.data.negatives.annotations = config_dict.placeholder(str)  # folder of `data.prepare annotate`; None: beside
    # Regions of an image, descriptions with boxes; see data/transforms/regions.py.
    config.data.regions = ConfigDict()
    config.data.regions.count = config_dict.placeholder(int)  # M, regions per image; None: none
    # None: of the records; "beside": of the files of `data.prepare annotate regions`, or their folder.
    config.data.regions.source = config_dict.placeholder(str)
    config.data.regions.min_area = 0.5  # share of a box that a crop has to show, or the region is left out
    # See AugmentationOptions in data/transforms/images.py.
    config.data.augmentation = ConfigDict(dict(scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)))
    config.data.augmentation.squash = False  # True: no crop is drawn, the whole picture is resized
    config.data.augmentation.flip = 0.0  # share of the pictures that are mirrored, left for right, such as 0.5
    config.data.augmentation.sided = "refuse"  # texts that say left or right end such a run; "keep", "flip" the picture
    config.data.pixels = "reference"  # the reference's to the bit; "fast", or "device": cropped inside the step
    config.data.packing = ConfigDict()  # of captions, side by side
    config.data.packing.row_length = config_dict.placeholder(int)  # tokens; None: a row for each caption
    config.data.packing.quantile = 0.95  # share of batches that get the fewest rows; the others get more of them
    config.data.packing.truncate = False  # True: always the same rows, and the longest captions are cut to fit
    config.data.upright = False  # True: photographs are turned as their EXIF orientation says; the reference does not
    config.data.workers = 0  # processes that decode; 0: threads
    config.data.index_dir = config_dict.placeholder(str)  # where indexes of shards are kept; None: beside them
    config.data.max_skipped = 0.01  # share of unusable samples at which the run stops

    config.evaluators = ConfigDict()  # name -> kind and options, see flair_jax/evaluate.py
    config.data_root = config_dict.placeholder(str)  # of the public evaluation sets, a folder each
    config.feature_store = config_dict.placeholder(str)  # folder where an evaluation keeps features; None: in WORKDIR
    return config
