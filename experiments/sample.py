"""Generates text from a trained model.

    python -m experiments.sample --workdir=/tmp/tiny --prompt="def " --tokens=200

Several prompts are generated at once: repeat --prompt, or give a file with one prompt a line.
`--layout` says how each is written: plain; shared_prompt (the first stream alone reads the prompt);
or in several branches, as hogwild, multiverse, threadweaver, parathinker or ape do it. Their tags
and numbers are given as JSON:

    --layout='{"name": "hogwild", "workers": ["\\n\\nA: ", "\\n\\nB: "]}'
"""

import contextlib
import os
import sys
from collections.abc import Iterable

from absl import flags

from experiments import program
from sharding.settings import InputError

BRANCHES = 16
"""Of a prompt, for which the cache has room where a layout has several."""

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
flags.DEFINE_string("layout", "plain", "how a text is written", flag_values=FLAGS)
flags.DEFINE_integer(
    "cache_tokens", 0, "tokens of one stream that the cache holds; 0: enough", 0, flag_values=FLAGS
)
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

    from parscale import generate, layout_text, tokenizers, workdir
    from parscale.sampling import Sampling
    from sharding.mesh import make_mesh

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    weights = workdir.load_weights(options.workdir, options.streams)
    tokenizer = tokenizers.load(weights.data.tokenizer)
    layout = layout_text.read(options.layout, tokenizer)
    mesh = make_mesh(mesh_config) if mesh_config else None
    model = weights.build(mesh)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    simple = layout in layout_text.FUNCTIONS.values()
    try:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            branches = 1 if simple else BRANCHES
            engine = generate.engine_for(
                model, encoded, options.tokens, branches, options.cache_tokens
            )
            until = () if simple else (tokenizer.encode(stop) for stop in options.stop)
            numbers = generate.submit_all(
                engine, encoded, options.tokens, sampling, layout=layout,
                until=frozenset(map(tuple, until)),
            )  # fmt: skip
            if simple:
                show(
                    prompts,
                    generate.stream_text(engine, tokenizer, numbers, stops=options.stop),
                )
            else:
                show_whole(prompts, tokenizer, engine.run())
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


def show_whole(prompts: list[str], tokenizer, results: dict) -> None:
    """Prints prompts with what follows them, and what it took; then fails if one of them did."""
    for (number, result), prompt in zip(sorted(results.items()), prompts, strict=True):
        text = tokenizer.decode([i for i in result.tokens if i < tokenizer.vocab_size])
        print(f"--- {number}\n{prompt}{text}", flush=True)
        if result.error is None:
            took = result.ledger
            print(
                f"{took.generated} tokens generated, {took.longest} of them one after the other",
                file=sys.stderr,
            )
    for _, result in sorted(results.items()):
        if result.error is not None:
            raise result.error


if __name__ == "__main__":
    program.run(main, FLAGS)
