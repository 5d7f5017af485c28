"""Scripts for the generation engine: how published systems write a text (`parscale.branches`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from parscale.branches import Branch

if TYPE_CHECKING:
    from parscale.engine import Request


def plain(root: Branch, request: "Request") -> Iterator:
    """The prompt, and what follows it."""
    yield [root.write(request.prompt, request.tokens, request.until)]
    return root.new
