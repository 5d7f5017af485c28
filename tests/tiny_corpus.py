"""The text that tests of whole runs read."""

import random
from pathlib import Path


def write_texts(folder: Path) -> Path:
    """Twenty documents that look like a language, some on each side of the split."""
    words = random.Random(1)
    folder.mkdir(exist_ok=True)
    for number in range(20):
        lines = (f"def f{words.randrange(9)}(x):\n    return x + {number}" for _ in range(40))
        (folder / f"{number:02}.txt").write_text("\n".join(lines))
    return folder
