"""Weights from one kind of folder to another, with more streams where asked."""

import dataclasses
import shutil
from pathlib import Path

import jax

from models import huggingface
from models.config import ModelConfig
from models.growth import begin_from, check_growable
from parscale import config_io, paths, tokenizers, workdir
from parscale.checkpoints import Checkpoints
from parscale.config import Config
from parscale.quiet import quiet_late_writes
from sharding.settings import InputError


@quiet_late_writes()
def convert(
    source: str | Path, target: str | Path, *, to: str, streams: int | None = None, seed: int = 0
) -> ModelConfig:
    """Writes the weights of `source` to `target`.

    Args:
      source: a workdir of ours or a Hugging Face directory.
      target: a folder that does not exist or is empty.
      to: "workdir" or "huggingface".
      streams: how many the target has. A workdir that keeps this number gives it; otherwise new
        streams are added.
      seed: of the initial values of new streams.

    Returns:
      the shape of the model that was written.

    Raises:
      InputError: the source cannot be read, the target is in the way, the streams would have to
        shrink, or the model does not fit Hugging Face's layout.
    """
    source, target = Path(source), Path(target)
    paths.check_folder(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is in the way: give a folder that does not exist or is empty")
    weights = workdir.load_weights(source, _kept_streams(source, streams))
    model, params = weights.model, weights.params
    if streams is not None and streams != model.streams:
        model = dataclasses.replace(model, streams=streams)
        check_growable(weights.model, model)
        params = begin_from(model, jax.random.key(seed), params)
    origin = source if workdir.is_huggingface(source) else source / workdir.ORIGIN
    origin = origin if (origin / huggingface.CONFIG).exists() else None
    if to == "huggingface":
        tokenizer = tokenizers.load(weights.data.tokenizer)
        huggingface.save_params(params, model, target, like=origin)
        if isinstance(tokenizer, tokenizers.BPETokenizer):
            tokenizer.save(target / "tokenizer.json")
        return model
    target.mkdir(parents=True, exist_ok=True)
    data = weights.data
    if origin is not None:
        kept = target / workdir.ORIGIN
        kept.mkdir()
        for name in (huggingface.CONFIG, *huggingface.TOKENIZER_FILES):
            if (origin / name).exists():
                shutil.copy(origin / name, kept / name)
        if (kept / "tokenizer.json").exists():
            data = dataclasses.replace(data, tokenizer=str((kept / "tokenizer.json").absolute()))
    with Checkpoints(target / workdir.CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(0, {"trainable": params}, {}, wait=True)
    config_io.to_json(Config(model=model, data=data), target / workdir.CONFIG)
    return model


def _kept_streams(source: Path, streams: int | None) -> int | None:
    """`streams` if the workdir `source` has to choose by it, else None."""
    kept = workdir.kept_runs(source)
    return streams if streams in kept or len(kept) > 1 else None
