"""The whole configuration of a run, as frozen dataclasses."""

import dataclasses

from models.config import ModelConfig
from sharding.mesh import MeshConfig
from sharding.settings import InputError, check_at_least, check_choices, option

SCHEDULES = ("cosine", "constant", "wsd")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads."""

    corpus: str = option(
        "pystdlib",
        "pystdlib, pypackages, a folder made by experiments.prepare_data, or a glob of text files",
    )
    tokenizer: str = option("bytes", "bytes, or the path of a tokenizer.json")
    length: int = option(256, "tokens in a row [T]")
    batch: int = option(16, "rows in a step, over all devices and hosts [B]")
    held_out: float = option(0.05, "share of the documents, by hash, that training never sees")
    seed: int = option(0, "seed of the order of rows")

    def __post_init__(self):
        check_at_least(self, 1, "batch")
        check_at_least(self, 2, "length")
        if not 0.0 < self.held_out < 1.0:
            raise InputError(f"held_out={self.held_out}: expected a value between 0 and 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a run learns, reports and saves."""

    steps: int = option(1000, "optimizer steps", resume="free")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    warmup_steps: int = option(100, "steps of linear warm-up from 0")
    schedule: str = option(
        "cosine", "after the warm-up; wsd is warm-up, stable, decay", choices=SCHEDULES
    )
    decay_steps: int = option(0, "last steps that decay linearly (wsd only)")
    final_rate: float = option(0.1, "learning rate at the end, as a share of the peak")
    b1: float = option(0.9, "AdamW's decay of the first moment")
    b2: float = option(0.95, "AdamW's decay of the second moment")
    adam_eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.1, "weight decay of matrices (not of norms, biases, prefixes)")
    clip_norm: float = option(1.0, "largest global norm of the gradient; 0 does not clip")
    accumulate: int = option(1, "parts in which a batch is computed, one after the other")
    loss_chunk: int = option(256, "positions whose logits exist at once")
    seed: int = option(0, "seed of the initial weights")
    init_from: str = option("", "start from the weights of this workdir or Hugging Face directory")
    trainable: str = option(
        "all",
        "what learns: all, only the streams' own parameters and the aggregation, or all but the "
        "streams' transforms, which then stay as they were drawn",
        choices=("all", "streams", "all_but_transform"),
    )
    max_bad_steps: int = option(
        10, "non-finite steps in a row after which the run stops", resume="free"
    )
    log_every: int = option(10, "steps between log lines", resume="free")
    eval_every: int = option(
        0, "steps between evaluations; 0 evaluates at the end only", resume="free"
    )
    eval_rows: int = option(256, "most held-out rows in an evaluation", resume="free")
    sample_tokens: int = option(128, "tokens of each sample printed at the end", resume="free")
    checkpoint_every: int = option(
        0, "steps between checkpoints; 0 saves by time only", resume="free"
    )
    checkpoint_minutes: float = option(
        5.0, "minutes between checkpoints; 0: by steps only", resume="free"
    )
    keep: int = option(3, "newest checkpoints that are kept", resume="free")

    def __post_init__(self):
        check_choices(self)
        check_at_least(
            self, 1, "steps", "accumulate", "loss_chunk", "max_bad_steps", "log_every", "keep"
        )
        check_at_least(
            self, 0, "learning_rate", "warmup_steps", "decay_steps", "final_rate", "weight_decay",
            "clip_norm", "eval_every", "eval_rows", "sample_tokens", "checkpoint_every",
            "checkpoint_minutes",
        )  # fmt: skip
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed={self.seed}: expected 0 to {2**31 - 1}")
        if self.schedule == "wsd" and self.decay_steps < 1:
            raise InputError(
                "schedule=wsd: decay_steps must be at least 1, the length of the decay"
            )
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            raise InputError(
                f"schedule=wsd: warmup_steps={self.warmup_steps} and decay_steps="
                f"{self.decay_steps} are together more than steps={self.steps}"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """All of a run but where it is kept."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self):
        if self.data.batch % self.train.accumulate:
            raise InputError(
                f"data.batch={self.data.batch} does not divide into "
                f"train.accumulate={self.train.accumulate} equal parts"
            )
        if self.train.trainable == "streams" and self.model.streams == 1:
            raise InputError(
                "train.trainable=streams: with model.streams=1 there is nothing to learn; "
                "give --config.model.streams=2 or more"
            )
