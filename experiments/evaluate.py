"""Loss of a trained model on held-out text, and what its streams do.

python -m experiments.evaluate --workdir=/tmp/tiny
python -m experiments.evaluate --workdir=/tmp/tiny --files='notes/*.txt'
python -m experiments.evaluate --workdir=/tmp/tiny --shared_prompt=128
"""

import json

from absl import flags

from experiments import program
from sharding.settings import InputError

FLAGS = program.new_flags(mesh=True)
flags.DEFINE_string(
    "workdir", "", "workdir of a run, or a Hugging Face directory", flag_values=FLAGS
)
flags.DEFINE_integer(
    "streams", None, "which number of streams, if the workdir keeps several", flag_values=FLAGS
)
flags.DEFINE_string(
    "files", "", "glob of text files; default: the held-out files of the run's corpus",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("rows", 512, "most rows of text to read; 0: all", flag_values=FLAGS)
flags.DEFINE_integer(
    "shared_prompt", 0, "also: the loss after so many tokens of a row if the first stream alone "
    "had read them, as with --layout=shared_prompt of experiments.sample", 0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("batch", 16, "rows at a time", flag_values=FLAGS)
flags.DEFINE_string("json", "", "also write the figures to this file", flag_values=FLAGS)


def main(options: flags.FlagValues) -> None:
    if not options.workdir:
        raise InputError("--workdir is missing: expected a run or a Hugging Face directory")
    if options.batch < 1 or options.rows < 0:
        raise InputError(
            f"--batch={options.batch} --rows={options.rows}: expected at least 1 and at least 0"
        )
    mesh_config = program.load_mesh(options)
    from parscale import data, evaluation, paths, shared_prompt, workdir
    from sharding.mesh import make_mesh

    mesh = make_mesh(mesh_config) if mesh_config else None
    if options.json:
        paths.check_file("json", options.json)
    weights = workdir.load_weights(options.workdir, options.streams)
    vocab_size = weights.model.vocab_size
    if options.files:
        text = data.open_files(options.files, weights.data, vocab_size)
    else:
        text = data.open_data(weights.data, vocab_size)
    if text.held_out_tokens <= text.held_out_documents:
        raise InputError(f"{options.files or weights.data.corpus}: no document has two tokens")
    model = weights.build(mesh)
    read = lambda: data.held_out_batches(text, options.batch, options.rows)
    losses = None
    if options.shared_prompt:
        if mesh is not None:
            raise InputError("--shared_prompt is measured on one device: give no --config.mesh")
        losses = shared_prompt.compare(model, read(), options.shared_prompt, weights.loss_chunk)
    result = evaluation.report(model, read(), weights.loss_chunk, mesh)
    print(evaluation.describe(result, text.bits_per_byte(result.loss)))
    if losses is not None:
        print(
            f"\nafter {options.shared_prompt} tokens  {losses.exact:.4f} nats per token\n"
            f"read by one stream   {losses.shared:.4f} ({losses.shared - losses.exact:+.4f}), "
            f"{losses.tokens} tokens"
        )
    if options.json:
        figures = {
            "loss": result.loss,
            "bits_per_byte": text.bits_per_byte(result.loss),
            "tokens": result.tokens,
            "stream_losses": result.stream_losses.tolist(),
            "weights": result.weights.tolist(),
            "weight_entropy": result.weight_entropy,
            "agreement": result.agreement.tolist(),
            "gain": result.gain,
            "collapsed": result.collapsed,
        }
        if losses is not None:
            figures["shared_prompt"] = losses._asdict()
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    program.run(main, FLAGS)
