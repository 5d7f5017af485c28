"""Figures as text, for people to read on a terminal."""


def table(rows: list[list], indent: int = 0) -> str:
    """Aligned columns, below the names in the first row."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in texts)
    return "\n".join(" " * indent + line.rstrip() for line in lines)
