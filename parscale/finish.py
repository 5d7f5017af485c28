"""The end of a run: what its result holds, and a few samples of what it learned to write."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from models.transformer import LanguageModel
from parscale import data, flops, generate, ngrams, workdir
from parscale.host_data import held_out
from parscale.loss import perplexity
from parscale.progress import format_seconds
from parscale.provenance import provenance
from parscale.restart import Record
from parscale.sampling import Sampling
from parscale.training import Training, TrainState
from sharding import agreement, hosts

SAMPLE_PROMPTS = ("def ", "import ", "class ")


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def read_result(run: Path) -> dict[str, Any] | None:
    """What `result.json` holds, if there is one."""
    path = run / workdir.RESULT
    return json.loads(path.read_text()) if path.exists() else None


def finish(
    training: Training,
    text: data.Data,
    state: TrainState,
    record: Record,
    loss: float,
    run: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes and returns the result of a whole run, and shows samples.

    Args:
      training: the run.
      text: what it read.
      state: after its last step.
      record: of what it consumed.
      loss: held-out loss of `state`, nats per token.
      run: its folder.
      say: prints a line.

    Raises:
      DivergedError: the loss is not finite.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"the held-out loss after the last step is {loss}. Try a lower train.learning_rate "
            "or a longer train.warmup_steps, in a new --workdir"
        )
    bits = text.bits_per_byte(loss)
    say(f"held-out loss {loss:.4f} nats per token, {bits:.4f} bits per byte")
    samples = training.config.train.sample_tokens > 0
    digest, leaves = read_weights(state, keep=samples and hosts.several())

    def write() -> dict[str, Any]:
        figures = {
            "held_out_loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": bits,
            "ngram_bits_per_byte": count_ngrams(training, text, say),
            "skipped_steps": int(state.skipped),
            "weights_sha256": digest,
        }
        result = describe(training, text, record) | figures | provenance(training.mesh)
        path = run / workdir.RESULT
        path.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(path.with_suffix(".partial"), path)
        return result

    result = agreement.from_process_0(write)
    if samples and jax.process_index() == 0:
        show_samples(whole_model(training, state, leaves), training, text)
    say(f"{format_seconds(record.seconds)} of training; results in {run}")
    return result


def describe(training: Training, text: data.Data, record: Record) -> dict[str, Any]:
    """What a result says of the run besides its figures."""
    config = training.config
    counts = flops.parameter_counts(config.model)
    step_flops = flops.train_flops(config.model, config.data.length, config.data.batch)
    return {
        "steps": config.train.steps,
        "tokens": record.tokens,
        "seconds": round(record.seconds, 3),
        "streams": config.model.streams,
        "parameters": counts["total"],
        "non_embedding_parameters": counts["non_embedding"],
        "flops": step_flops * config.train.steps,
        "examples_sha256": record.examples,
        "corpus_sha256": text.corpus_hash,
        "tokenizer": text.tokenizer.fingerprint,
    }


def count_ngrams(
    training: Training, text: data.Data, say: Callable[[str], None]
) -> dict[str, float]:
    """Bits per byte of models that count the training bytes; nothing where tokens are not bytes."""
    if text.tokenizer.fingerprint != "bytes":
        return {}
    counts = ngrams.count(text.train.tokens)
    baselines = ngrams.bits_per_byte(counts, held_out(training, text))
    say(
        "byte models counted on the same training bytes: "
        + ", ".join(f"{name} {value:.4f}" for name, value in baselines.items())
    )
    return baselines


def read_weights(state: TrainState, keep: bool = False) -> tuple[str, list[Any]]:
    """The SHA-256 over all parameters in order of name, and on process 0 the parameters.

    All processes must call it: one array after the other is gathered where devices of several
    processes hold it.

    Args:
      state: of the run.
      keep: return the arrays, too, in the order of `jax.tree.leaves`, as NumPy arrays.
    """
    digest, kept = hashlib.sha256(), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params()):
        array = agreement.gather(leaf)
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(array.tobytes())
        if keep and jax.process_index() == 0:
            kept.append(array)
    return digest.hexdigest(), kept


def whole_model(training: Training, state: TrainState, leaves: list[Any]) -> LanguageModel:
    """The model on the devices that have it, or from `leaves` on one device of this process.

    What one process alone computes must not wait for the devices of others.
    """
    if not hosts.several():
        return training.model(state)
    params = jax.tree.unflatten(jax.tree.structure(state.params()), leaves)
    return workdir.Weights(training.config.model, params, training.config.data).build()


def show_samples(model: LanguageModel, training: Training, text: data.Data) -> None:
    """Prints what the model writes after a few beginnings."""
    texts = generate.complete(
        model,
        text.tokenizer,
        SAMPLE_PROMPTS,
        training.config.train.sample_tokens,
        Sampling(temperature=0.8, seed=0),
    )
    for prompt, new in zip(SAMPLE_PROMPTS, texts, strict=True):
        print(f"--- sample\n{prompt}{new}")
