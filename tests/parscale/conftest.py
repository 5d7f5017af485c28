"""What tests of the generation engine have in common."""

import jax
import pytest

from parscale import engine_rows


@pytest.fixture
def few_shapes(request, monkeypatch):
    """Has the engine compile its steps for few numbers of rows, tokens and blocks.

    Default tests spend most of their time on that. Slow ones take all numbers.
    """
    slow = request.node.get_closest_marker("slow") is not None
    if not slow:
        for name, least in (("ROWS", 4), ("TOKENS", 32), ("BLOCKS", 32)):
            monkeypatch.setattr(engine_rows, f"FEWEST_{name}", least)
    yield
    if slow:
        jax.clear_caches()  # compiled steps take many of the memory maps of a process
