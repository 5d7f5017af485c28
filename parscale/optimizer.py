"""AdamW and the learning-rate schedules, from optax."""

import optax

from parscale.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0, then cosine, constant, or stable with a linear decay at the end."""
    peak, end = config.learning_rate, config.learning_rate * config.final_rate
    rest = max(config.steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_rate)
    elif config.schedule == "wsd":
        after = optax.linear_schedule(
            peak, end, config.decay_steps, transition_begin=rest - config.decay_steps
        )
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: TrainConfig, decays) -> optax.GradientTransformation:
    """AdamW with clipping by global norm.

    Args:
      config: rates and decays.
      decays: pytree of bools like the parameters: which of them weight decay shrinks.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(clip, adamw)
