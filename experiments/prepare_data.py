"""Tokenises a corpus once, into a folder that training reads.

    python -m experiments.prepare_data --corpus='texts/**/*.txt' --folder=/data/mine
    python -m experiments.prepare_data --corpus=web.jsonl.zst --learn=8192 --folder=/data/web

A corpus is pystdlib, pypackages, a file, a folder or a glob. A file is a document; of a .jsonl file
each line is one, an object whose "text" counts; .gz and .zst files are decompressed. A document is
held out, or not, by the hash of its contents.
"""

from pathlib import Path

from absl import flags as absl_flags

from experiments import program
from sharding.settings import InputError

FLAGS = program.new_flags()
absl_flags.DEFINE_string(
    "corpus", None, "pystdlib, pypackages, a file, a folder or a glob", flag_values=FLAGS
)
absl_flags.DEFINE_string("folder", None, "where to; a new or empty folder", flag_values=FLAGS)
absl_flags.DEFINE_string(
    "tokenizer", "bytes", "bytes, or the path of a tokenizer.json", flag_values=FLAGS
)
absl_flags.DEFINE_integer(
    "learn",
    0,
    "learn a byte-level BPE tokenizer with so many tokens on the corpus, and use it",
    flag_values=FLAGS,
)
absl_flags.DEFINE_float(
    "held_out", 0.05, "share of the documents, by hash, that training never sees", flag_values=FLAGS
)


def main(flags: absl_flags.FlagValues) -> None:
    from parscale import prepared, tokenizers

    for name in ("corpus", "folder"):
        if not flags[name].value:
            raise InputError(f"--{name} is missing: expected {flags[name].help}")
    if flags.learn and flags.tokenizer != "bytes":
        raise InputError(f"--learn={flags.learn} and --tokenizer={flags.tokenizer}: give only one")
    if flags.learn and flags.learn < 256:
        raise InputError(f"--learn={flags.learn}: expected at least 256, one token for each byte")
    folder = Path(flags.folder).expanduser()
    prepared.check_empty(folder)
    if flags.learn:
        tokenizer = prepared.learn_tokenizer(flags.corpus, flags.learn, held_out=flags.held_out)
    else:
        tokenizer = tokenizers.load(flags.tokenizer)
    metadata = prepared.prepare(flags.corpus, tokenizer, folder, held_out=flags.held_out)

    for name in prepared.SIDES:
        side = getattr(metadata, name)
        print(
            f"{name:8} {side.documents:>9} documents {side.bytes:>13} bytes "
            f"{side.tokens:>13} tokens ({side.bytes / side.tokens:.2f} bytes each)"
        )
    print(f"corpus hash {metadata.corpus_hash}")
    fields = {"data.corpus": folder, "data.held_out": metadata.held_out_share}
    if tokenizer.fingerprint != "bytes":
        fields |= {
            "data.tokenizer": folder / prepared.TOKENIZER,
            "model.vocab_size": tokenizer.vocab_size,
        }
    print("train with", *(f"--config.{name}={value}" for name, value in fields.items()))


if __name__ == "__main__":
    program.run(main, FLAGS)
