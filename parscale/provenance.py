"""What made a result: the code's commit, the machine, the versions of what was used."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def provenance(mesh: Mesh) -> dict[str, Any]:
    """`commit`, `device` (number and kind of the mesh's), `host` and `versions`."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "commit": commit(),
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions | {"python": platform.python_version()},
    }


def commit() -> str:
    """Git commit of the code, with `-changed` if tracked files differ from it; "" without git."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                check=True,
            ).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("-changed" if changes else "")
