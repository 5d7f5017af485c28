"""What `law_cpu` is compared with, at its middle size: controls, second stage, kinds of streams.

    python -m experiments.scaling_law sweep --config=experiments/configs/law_cpu_controls.py \
      --workdir=/tmp/law_controls

base     P = 1 and P = 4 as in `law_cpu`
frozen   P = 4 whose prefixes stay as they were drawn
wide     P = 1, twice as wide, with an MLP that makes its FLOPs those of P = 4; two learning rates
more     10 % more tokens for the P = 1 model: P = 1 goes on, or it is recycled to P = 2 and 4 with
         everything learning (`all`; `normal` with small random prefixes in place of keys and values
         of tokens) or on a frozen backbone (`streams`)
init     P = 4 with other prefixes: M slots, drawn from N(0, std) or keys and values of tokens
kinds    P = 4 with other input transforms and aggregations
"""

from experiments.configs.law_cpu import BASE, RATES, SIZES, seeds
from parscale.sweep import Point, Sweep, product

SEEDS = 3
MIDDLE = product(SIZES[1:2], RATES[1:2])[0].fields
FIRST = "base-P1"


def named(name: str, **fields) -> list[Point]:
    """The middle size with changes, given with `__` for the dot, for every seed."""
    changes = {field.replace("__", "."): value for field, value in fields.items()}
    return product([Point(name, MIDDLE | changes)], seeds(SEEDS))


def more(name: str, **fields) -> list[Point]:
    """A tenth more steps after the P = 1 model, on other text, at a learning rate of its own."""
    own = {
        "train__steps": BASE.train.steps // 10,
        "train__warmup_steps": 4,
        "train__learning_rate": 2e-3,
    }
    points = named(f"more-{name}", **(own | fields))
    return [
        Point(
            point.name,
            point.fields | {"data.seed": point.fields["data.seed"] + 100},
            after=f"{FIRST}-s{point.fields['train.seed']}",
        )
        for point in points
    ]


def get_sweep() -> Sweep:
    four = {"model__streams": 4}
    points = named(FIRST) + named("base-P4", **four)
    points += named("frozen", **four, train__trainable="all_but_transform")
    wide = {
        "model__width": 96, "model__heads": 6, "model__kv_heads": 2, "model__mlp_width": 352,
    }  # fmt: skip
    for rate in (2e-3, 4e-3):
        points += named(f"wide-r{rate}", **wide, train__learning_rate=rate)
    points += more("P1")
    for streams in (2, 4):
        grown = {"model__streams": streams}
        points += more(f"all-P{streams}", **grown)
        points += more(f"normal-P{streams}", **grown, model__transform_init="normal")
        points += more(f"streams-P{streams}", **grown, train__trainable="streams")
    for size in (4, 16):
        slots = {"model__transform_size": size}
        for std in (0.02, 1.0):
            normal = {"model__transform_init": "normal", "model__transform_std": std}
            points += named(f"init-M{size}-std{std}", **four, **slots, **normal)
    points += named("init-M16-tokens", **four, model__transform_size=16)
    for transform, size, std in (("soft_tokens", 4, 0.06), ("low_rank", 4, 0.02), ("bias", 1, 0.1)):
        points += named(
            f"kinds-{transform}", **four, model__transform=transform, model__transform_size=size,
            model__transform_init="normal", model__transform_std=std,
        )  # fmt: skip
    for aggregation in ("constant", "mean"):
        points += named(f"kinds-{aggregation}", **four, model__aggregation=aggregation)
    return Sweep(BASE, points)
