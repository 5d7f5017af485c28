"""Generates text from a trained model.

    python -m experiments.sample --workdir=/tmp/tiny --prompt="def " --tokens=200

Several prompts are generated at once: repeat --prompt, or give a file with one prompt a line.
"""

import contextlib
import os
import sys
from collections.abc import Iterable

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
flags.DEFINE_multi_string("prompt", [], "text to go on from; may be repeated", flag_values=FLAGS)
flags.DEFINE_string("prompt_file", "", "a file with one prompt a line", flag_values=FLAGS)
flags.DEFINE_integer("tokens", 256, "most tokens to generate for each prompt", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "divides the logits; 0 is greedy", flag_values=FLAGS)
flags.DEFINE_integer("top_k", 0, "choose among this many tokens; 0: all", flag_values=FLAGS)
flags.DEFINE_float("top_p", 1.0, "choose among tokens of this total probability", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of the choices", 0, 2**32 - 1, flag_values=FLAGS)
flags.DEFINE_multi_string("stop", [], "end at this text; may be repeated", flag_values=FLAGS)


def read_prompts(options: flags.FlagValues) -> list[str]:
    """The prompts of the command line, then those of the file."""
    prompts = list(options.prompt)
    if options.prompt_file:
        try:
            with open(options.prompt_file, encoding="utf-8") as file:
                prompts += [line.removesuffix("\n") for line in file]
        except OSError as error:
            raise InputError(f"--prompt_file={options.prompt_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"--prompt_file={options.prompt_file} is not UTF-8 (byte {error.start})"
            ) from None
    if not prompts:
        raise InputError("no prompt: give --prompt=TEXT or --prompt_file=FILE")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError(f"--prompt={prompt!a} is not UTF-8") from None
    return prompts


def main(options: flags.FlagValues) -> int | None:
    prompts = read_prompts(options)
    if not options.workdir:
        raise InputError("--workdir is missing: expected a run or a Hugging Face directory")
    mesh_config = program.load_mesh(options)
    if mesh_config and mesh_config.sequence != 1:
        raise InputError(
            f"config.mesh.sequence={mesh_config.sequence}: text is written token by token, so "
            "there is no sequence to divide; give stream, tensor, fsdp or data"
        )
    import jax

    from parscale import generate, tokenizers, workdir
    from sharding import rules
    from sharding.mesh import make_mesh

    sampling = generate.Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    weights = workdir.load_weights(options.workdir, options.streams)
    tokenizer = tokenizers.load(weights.data.tokenizer)
    mesh = make_mesh(mesh_config) if mesh_config else None
    if mesh is not None:
        rules.check_divisible("the prompts", (len(prompts),), ("batch",), mesh)
    model = weights.build(mesh)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    generate.check_prompts(model, encoded, options.tokens)
    texts = generate.stream_text(
        model, tokenizer, encoded, options.tokens, sampling, stops=options.stop
    )
    try:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            show(prompts, texts)
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return None


def show(prompts: list[str], texts: Iterable[list[str]]) -> None:
    """Prints prompts with what follows them: a single one as it comes, several at the end."""
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for (piece,) in texts:
            print(piece, end="", flush=True)
        print(flush=True)
        return
    whole = [""] * len(prompts)
    for done, pieces in enumerate(texts, 1):
        whole = [text + piece for text, piece in zip(whole, pieces, strict=True)]
        if sys.stderr.isatty():
            print(f"\r{done} parts", end="", file=sys.stderr, flush=True)
    for number, (prompt, text) in enumerate(zip(prompts, whole, strict=True)):
        print(f"--- {number}\n{prompt}{text}", flush=True)


if __name__ == "__main__":
    program.run(main, FLAGS)
