"""Which implementation of an op runs: chosen by name, or by the platform that is compiled for."""

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
from jax import lax

# The platform that runs a Pallas implementation, by jax's name for it.
PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
HOPPER = "9.0"

# Part of jit's cache key, so that a function traced for one target is not used for another.
_target = jax.make_user_context(None)
_interpret = jax.make_user_context(None)


def compiling_for(platform: str):
    """A context in which ops are traced for `platform` ("tpu", "cuda" or "cpu"), not for this
    process's own devices: for ahead-of-time compilation."""
    if platform not in ("tpu", "cuda", "cpu"):
        raise ValueError(f"platform={platform!r}: expected 'tpu', 'cuda' or 'cpu'")
    return _target(platform)


def interpreting(params=True):
    """A context in which Pallas implementations run in an interpreter on any platform: for tests.

    Args:
      params: True, or parameters of the interpreter: `pltpu.InterpretParams` or its counterpart
        for Mosaic GPU; hashable.
    """
    return _interpret(params)


def interpret():
    """What a kernel is to be given as `interpret`: False unless within `interpreting`."""
    return False if _interpret.value is None else _interpret.value


def check(implementation: str | None, names: Iterable[str]):
    """Refuses an implementation that is not one of `names`, or cannot run on the platform.

    Raises:
      ValueError: it is not None and one of these.
    """
    if implementation is None:
        return
    if implementation not in names:
        known = ", ".join(names)
        raise ValueError(f"implementation={implementation!r}: expected one of {known}, or None")
    if implementation in PLATFORM_OF and _interpret.value is None:
        why = _unfit(PLATFORM_OF[implementation])
        if why:
            raise ValueError(
                f"implementation={implementation!r} cannot run here: {why}; "
                "None chooses one that can"
            )


def fits(implementation: str) -> bool:
    """Whether a Pallas implementation can run where the program being traced will."""
    return not _unfit(PLATFORM_OF[implementation])


def choose(implementation: str | None, functions: Mapping[str, Callable]) -> Callable:
    """The function to trace for an op.

    Args:
      implementation: a key of `functions`, checked; None: the best one, by the platform that is
        lowered for, among those that this process may lower for.
      functions: implementations by name, "xla" among them.
    """
    if implementation is not None:
        return functions[implementation]
    if _interpret.value is not None:
        return functions["xla"]
    fitting = {
        PLATFORM_OF[name]: function
        for name, function in functions.items()
        if name in PLATFORM_OF and fits(name)
    }
    if not fitting:
        return functions["xla"]

    def call(*args):
        return lax.platform_dependent(*args, default=functions["xla"], **fitting)

    return call


def _unfit(platform: str) -> str:
    """Why a kernel for `platform` cannot run where the program being traced will; "" if it can."""
    if _target.value is not None:
        return "" if _target.value == platform else f"the target is {_target.value!r}"
    backend = jax.default_backend()
    if platform == "tpu":
        return "" if backend == "tpu" else f"it needs a TPU, the devices are {backend!r}"
    if backend != "gpu":
        return f"it needs an NVIDIA GPU, the devices are {backend!r}"
    return _unfit_gpu()


@functools.cache
def _unfit_gpu() -> str:
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", "unknown")
    if capability == HOPPER:
        return ""
    return f"it needs compute capability {HOPPER}, {device.device_kind} has {capability}"
