"""Every key of a run with the defaults of FLAIR's recipe. A config starts from here and says what differs."""

from ml_collections import ConfigDict, config_dict

from configs import variants


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the data, the crops and all draws
    config.batch_size = 128  # images a step, over all devices
    config.steps = config_dict.placeholder(int)  # length of the run: this …
    config.epochs = config_dict.placeholder(float)  # … or this
    config.init_from = config_dict.placeholder(str)  # weights to start from: a workdir, .safetensors or .pt
    config.log_every = 10  # steps, as all of these
    config.save_every = 1000
    config.keep = 2  # checkpoints
    config.eval_every = 0  # 0: only at the end
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))  # -1: all devices

    config.model = variants.flair("B/16")

    config.loss = ConfigDict()
    config.loss.block_size = config_dict.placeholder(int)  # images that the recipe has on a GPU; None: the whole batch
    config.loss.mps = True  # the multi-positive global loss beside the text-conditioned one
    config.loss.chunk_size = config_dict.placeholder(int)  # images at a time on a device, for memory; None: all

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = config_dict.placeholder(float)

    config.data = ConfigDict()
    config.data.shards = config_dict.placeholder(str)  # webdataset tars: "/data/{00000..00575}.tar", a folder, "a::b"
    config.data.captions = ConfigDict(dict(count=8, max_merged=3, reference_windows=True))
    config.data.augmentation = ConfigDict(dict(scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)))
    config.data.workers = 0  # processes that decode; 0: threads
    config.data.index_dir = config_dict.placeholder(str)  # where indexes of shards are kept; None: beside them
    config.data.max_skipped = 0.01  # share of unusable samples at which the run stops

    config.evaluators = ConfigDict()  # name -> kind and options, see flair_jax/evaluate.py
    return config
