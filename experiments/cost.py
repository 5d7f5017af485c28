"""Memory and latency of decoding with P streams, and where streams cost less than parameters.

    python -m experiments.cost --config=paper_1b6 --config.model.streams=8 --chip=H100 --batch=4
    python -m experiments.cost --config=paper_1b6 --config.model.streams=8 --figure=regions.png
    python -m experiments.cost --published --figure=published.png
    python -m experiments.cost --measure --config=small

Costs are formulas of the model's shape, with parameters, activations and cache in bfloat16; GiB are
2**30 bytes. "Parameters" are the plain model of equal loss by the scaling law. --published counts
as the ParScale paper does. --measure times decoding on this machine beside the prediction for it.
"""

import dataclasses
import functools

from absl import flags

from experiments import program
from sharding.settings import InputError

FLAGS = program.new_flags(config=True)
flags.DEFINE_string(
    "chip", "A100", "A100, H100, H200, v4, v5e, v5p, v6e or tpu7x", flag_values=FLAGS
)
flags.DEFINE_integer("batch", 1, "rows decoded at a time", flag_values=FLAGS)
flags.DEFINE_integer("prompt", 256, "tokens of each prompt", flag_values=FLAGS)
flags.DEFINE_integer("output", 256, "tokens generated for each", flag_values=FLAGS)
flags.DEFINE_float(
    "flops_efficiency", 0.7, "share of the chip's peak operations that is reached",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
    "bandwidth_efficiency", 0.9, "share of the chip's bandwidth that is reached", flag_values=FLAGS
)
flags.DEFINE_float(
    "k",
    0.3935,
    "of the scaling law, for the plain model of equal loss; by default the paper's, on code",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "figure", "", "also draw where streams cost less to this file, .png or .svg", flag_values=FLAGS
)
flags.DEFINE_boolean(
    "published", False, "instead: the ParScale paper's comparison, by its own assumptions",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean(
    "measure", False, "instead: decoding measured here (preset tiny, if none is given)",
    flag_values=FLAGS,
)  # fmt: skip

GiB = 2**30
STREAMS = (1, 2, 4, 8)
BATCHES = (1, 2, 4, 8, 16, 32)
PROMPTS = (64, 512, 2048, 8192, 32768)
# The paper's comparison (arXiv 2505.10475, figure 4): presets, streams, lengths of prompt and of
# output, and the losses on Stack between which that of 1.6B with P = 8 lies.
PAPER = {"1.6B": "paper_1b6", "2.8B": "paper_2b8", "4.4B": "paper_4b4"}
PAPER_ROWS = [("1.6B", 1), ("1.6B", 2), ("1.6B", 4), ("1.6B", 8), ("2.8B", 1)]
PAPER_ROWS += [("4.4B", 1), ("4.4B", 2), ("4.4B", 4), ("4.4B", 8)]
PAPER_LENGTHS = (64, 128, 256, 512)
PAPER_BATCHES = (1, 2, 4, 8)
PAPER_LOSSES = {"1.6B": 1.0383, "2.8B": 1.0451, "4.4B": 1.0213}
PAPER_OUTPUT = 128  # of prompts longer than the paper's


def main(options: flags.FlagValues) -> None:
    _refuse_together(options)
    if options.published:
        published(options)
    elif options.measure:
        measure(options)
    else:
        predict(options)


def predict(options: flags.FlagValues) -> None:
    """Costs of the preset's model on a chip, and against parameters if it has streams."""
    from parscale import cost, cost_comparison, law_figures
    from parscale.law_figures import short
    from parscale.text import table

    chip = cost.find_chip(options.chip)
    model = _model(options, "paper_1b6")
    if options.figure and model.streams == 1:
        raise InputError(
            f"--figure={options.figure}: one stream has nothing to be compared; "
            "give --config.model.streams=2 or more"
        )
    cost_of = functools.partial(
        cost.decode_cost,
        chip=chip,
        flops_efficiency=options.flops_efficiency,
        bandwidth_efficiency=options.bandwidth_efficiency,
    )
    lengths = {"batch": options.batch, "prompt": options.prompt, "output": options.output}
    larger = cost_comparison.equal_loss(model, options.k)
    costs = {
        P: cost_of(dataclasses.replace(model, streams=P), **lengths)
        for P in sorted({*STREAMS, model.streams})
    }
    if options.figure:
        law_figures.check_path(options.figure)
    params = cost.parameter_counts(model)["non_embedding"]
    print(
        f"{options.config}: N {short(params)} at P {model.streams}; batch {options.batch}, "
        f"prompt {options.prompt}, output {options.output}\n"
        f"{chip.name}: {options.flops_efficiency:g} of {chip.flops / 1e12:g} TFLOP/s, "
        f"{options.bandwidth_efficiency:g} of {chip.bandwidth / 1e9:g} GB/s, "
        f"{chip.memory / GiB:g} GiB\n"
    )
    print(table(_cost_rows(costs)))
    for P, found in costs.items():
        if not found.fits(chip):
            print(
                f"P = {P} does not fit: {found.memory.total / GiB:.1f} GiB are more than the "
                f"{chip.memory / GiB:g} of {chip.name}"
            )
    if model.streams == 1:
        print("\nOne stream: give --config.model.streams=2 or more to compare with parameters.")
        return
    totals_of = lambda shape: _totals(cost_of(shape, **lengths))
    means = cost_comparison.mixed_totals(larger, totals_of)
    ratios = cost_comparison.increase_ratios(model, larger, totals_of)
    size = sum(share * cost.parameter_counts(s)["non_embedding"] for share, s in larger)
    print(
        f"\nThe plain model of equal loss (k = {options.k:g}) has N {short(size)}: "
        f"{means.memory / GiB:.3f} GiB, {means.latency:.4g} s.\nFrom P = 1 it adds "
        f"{ratios.memory:.3g} times the memory and {ratios.latency:.3g} times the latency that "
        f"P = {model.streams} adds.\n"
    )
    panels = {f"P = {model.streams} on {chip.name}": (model, larger, cost_of)}
    _regions(panels, chip, options.output, options.figure)


def _cost_rows(costs: dict) -> list[list]:
    first = next(iter(costs.values()))
    rows = [["", *(f"P = {P}" for P in costs)]]

    def add(title: str, values: list[float], digits: str) -> None:
        rows.append([title, *(f"{value:{digits}}" for value in values)])

    for part in dataclasses.fields(first.memory):
        values = [getattr(found.memory, part.name) / GiB for found in costs.values()]
        add(f"memory, GiB: {part.name}", values, ".4f")
    streams = [found.memory.kv_cache / P / GiB for P, found in costs.items()]
    add("  kv_cache of one stream", streams, ".4f")
    add("  total", [found.memory.total / GiB for found in costs.values()], ".4f")
    for phase, title in (("prefill", "prefill, ms"), ("decode", "a step, ms")):
        steps = [max(found.steps, 1) if phase == "decode" else 1 for found in costs.values()]
        phases = [getattr(found, phase) for found in costs.values()]
        for part in dataclasses.fields(first.prefill):
            seconds = [getattr(latency, part.name) for latency in phases]
            values = [1e3 * t / n for t, n in zip(seconds, steps, strict=True)]
            add(f"{title}: {part.name}", values, ".4f")
        totals = [1e3 * latency.total / n for latency, n in zip(phases, steps, strict=True)]
        add("  total", totals, ".4f")
    add(f"latency with {first.steps} steps, s", [c.latency for c in costs.values()], ".4f")
    return rows


def published(options: flags.FlagValues) -> None:
    """The paper's comparison, and what its assumptions and ours say beyond it."""
    from parscale import cost, cost_comparison, law_figures
    from parscale.text import table

    if options.figure:
        law_figures.check_path(options.figure)
    models = {name: program.load_preset(preset).model for name, preset in PAPER.items()}
    chip = cost.CHIPS["A100"]
    rates = {
        "flops_efficiency": options.flops_efficiency,
        "bandwidth_efficiency": options.bandwidth_efficiency,
    }
    low, found, high = (PAPER_LOSSES[name] for name in ("2.8B", "1.6B", "4.4B"))
    share = (low - found) / (low - high)
    larger = ((1 - share, models["2.8B"]), (share, models["4.4B"]))
    streams = dataclasses.replace(models["1.6B"], streams=8)

    def mean(model, batch: int):
        return cost_comparison.mean_totals(
            [cost.published_cost(model, chip, batch, n, n, **rates) for n in PAPER_LENGTHS]
        )

    rows = [["", *(f"batch {batch}" for batch in PAPER_BATCHES)]]
    for name, P in PAPER_ROWS:
        model = dataclasses.replace(models[name], streams=P)
        totals = [mean(model, batch) for batch in PAPER_BATCHES]
        rows.append([f"{name} P {P}", *(f"{t.memory / GiB:.3f} / {t.latency:.3f}" for t in totals)])
    ratios = [
        cost_comparison.increase_ratios(streams, larger, functools.partial(mean, batch=batch))
        for batch in PAPER_BATCHES
    ]
    rows.append(["ratio", *(f"{ratio.memory:.1f} / {ratio.latency:.2f}" for ratio in ratios)])
    print(
        "The paper's assumptions (see parscale.cost.published_cost), A100, GiB / s: means over "
        f"prompt = output = {', '.join(map(str, PAPER_LENGTHS))}"
    )
    print(table(rows))
    print(
        "ratio: what parameters add to 1.6B P 1 up to the loss of 1.6B P 8, between 2.8B and 4.4B "
        "by their losses on Stack,\nover what P 8 adds. The paper: 22 times the memory, 6 times "
        "the latency, at batch 1.\n"
    )
    panels = {
        name: (streams, larger, functools.partial(function, chip=chip, **rates))
        for name, function in (
            ("1.6B P = 8 on A100, the paper's assumptions", cost.published_cost),
            ("1.6B P = 8 on A100, ours", cost.decode_cost),
        )
    }
    _regions(panels, chip, PAPER_OUTPUT, options.figure)


def _regions(panels: dict[str, tuple], chip, output: int, figure: str) -> None:
    """Prints, and draws, the ratios of each comparison over batch and prompt length."""
    import numpy as np

    from parscale import cost_comparison, cost_figures
    from parscale.text import table

    def regions(comparison: tuple, batches, prompts) -> list[cost_figures.Region]:
        """Of memory, and of latency."""
        model, larger, cost_of = comparison

        def cell(batch: int, prompt: int) -> tuple[float, float, bool]:
            cost = functools.partial(cost_of, batch=batch, prompt=prompt, output=output)
            ratios = cost_comparison.increase_ratios(model, larger, lambda s: _totals(cost(s)))
            return *ratios, cost(model).fits(chip)

        cells = np.array([[cell(batch, prompt) for prompt in prompts] for batch in batches])
        *ratios, fits = np.moveaxis(cells, -1, 0)
        return [cost_figures.Region(ratio, fits > 0) for ratio in ratios]

    print(
        "Cost added by parameters over cost added by streams: below 1 streams do not pay; "
        f"! they do not fit {chip.name}.\nOutput {output}."
    )
    for title, comparison in panels.items():
        memory, latency = regions(comparison, BATCHES, PROMPTS)
        rows = [["batch", *(f"prompt {prompt}" for prompt in PROMPTS)]]
        for place, batch in enumerate(BATCHES):
            cells = zip(
                memory.ratios[place], latency.ratios[place], memory.fits[place], strict=True
            )
            rows.append([batch, *(f"{m:.3g} / {t:.3g}{'' if f else ' !'}" for m, t, f in cells)])
        print(f"\n{title}: memory / latency\n{table(rows)}")
    if not figure:
        return
    # Half powers of two, as whole numbers.
    batches = sorted({round(2 ** (n / 2)) for n in range(15)})
    prompts = sorted({round(2 ** (n / 2)) for n in range(8, 31)})
    drawn = {}
    for title, comparison in panels.items():
        memory, latency = regions(comparison, batches, prompts)
        drawn[f"latency\n{title}"] = latency
        drawn[f"memory\n{title}"] = memory
    cost_figures.write_regions(figure, batches, prompts, drawn)
    print(f"\n{figure}")


def measure(options: flags.FlagValues) -> None:
    """Decoding measured on this machine for several P, and predicted for its measured rates.

    XLA on CPU reads the weights of a product with one row several times as fast as with two or
    more: at batch 1 there, the steps of P > 1 take longer beside that of P = 1 than predicted.
    """
    model = _model(options, "tiny")
    if options.output < 2:
        raise InputError(f"--output={options.output}: expected at least 2 to measure a step")
    from parscale import cost, cost_measured
    from parscale.text import table

    shapes = {P: dataclasses.replace(model, streams=P) for P in sorted({*STREAMS, model.streams})}
    lengths = {"batch": options.batch, "prompt": options.prompt, "output": options.output}
    activation_bytes = 2 if model.dtype == "bfloat16" else 4
    plain = dataclasses.replace(model, streams=1)
    chip = cost_measured.measure_chip(model.dtype, 4 * cost.parameter_counts(plain)["total"])
    predicted = [
        cost.decode_cost(
            shape,
            chip,
            flops_efficiency=1,
            bandwidth_efficiency=1,
            weight_bytes=4,
            activation_bytes=activation_bytes,
            **lengths,
        )
        for shape in shapes.values()
    ]
    print(
        f"{options.config}: width {model.width}, layers {model.layers}, vocabulary "
        f"{model.vocab_size}; batch {options.batch}, prompt {options.prompt}, output "
        f"{options.output}\n{chip.name}: measured just now, {chip.flops / 1e9:.4g} GFLOP/s in a "
        f"{model.dtype} product and {chip.bandwidth / 1e9:.4g} GB/s in a copy of as many bytes as "
        "the weights.\nThe prediction takes these rates, float32 weights and no time to start an "
        "operation. Compiling and timing takes a minute or more.\n",
        flush=True,
    )
    measured = cost_measured.measure_decoding(list(shapes.values()), **lengths)
    rows = [["", "prefill, ms", "predicted", "a step, ms", "predicted"]]
    rows[0] += ["step to P = 1", "predicted", "prefill to P = 1", "predicted"]
    for P, seen, guess in zip(shapes, measured, predicted, strict=True):
        times = (seen.prefill, guess.prefill.total, seen.step, guess.step)
        to_one = (
            seen.step / measured[0].step,
            guess.step / predicted[0].step,
            seen.prefill / measured[0].prefill,
            guess.prefill.total / predicted[0].prefill.total,
        )
        rows.append([f"P = {P}", *(f"{1e3 * time:.3f}" for time in times)])
        rows[-1] += [f"{ratio:.2f}" for ratio in to_one]
    print(table(rows))


def _model(options: flags.FlagValues, preset: str):
    """The model of --config, or of `preset`, with the fields given."""
    for name in ("batch", "prompt", "output"):
        if options[name].value < 1:
            raise InputError(f"--{name}={options[name].value}: expected at least 1")
    if options.config is None:
        options.config = preset
    return program.load_config(options).model


def _totals(cost):
    from parscale.cost_comparison import mean_totals

    return mean_totals([cost])


def _refuse_together(options: flags.FlagValues) -> None:
    """Raises InputError for flags that the chosen comparison would not heed."""
    if options.published:
        unheeded = ["measure", "chip", "batch", "prompt", "output", "k", "config"]
        unheeded += [f"config.{name}" for name in program.changes(options)]
        why = "--published compares the paper's own shapes, chip and lengths"
    elif options.measure:
        unheeded = ["chip", "flops_efficiency", "bandwidth_efficiency", "k", "figure"]
        why = "--measure takes the rates of this machine and draws nothing"
    else:
        return
    for name in unheeded:
        if options[name].present:
            raise InputError(f"{why}: leave out --{name}")


if __name__ == "__main__":
    program.run(main, FLAGS)
