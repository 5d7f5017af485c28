"""The paper's 2.8B shape: N = 2,774,773,760 with one stream, 2,815,424,520 with eight.

    python -m experiments.train --config=paper_2b8 --config.model.streams=8 --workdir=paper_2b8

Reads `corpus/` (made by experiments.prepare_data from your own text) and Qwen2.5's `tokenizer.json`
in the current folder; --config.data.corpus and --config.data.tokenizer name others.
What of the recipe was published and what is our choice: experiments/configs/_paper.py.

Hardware, time and expected figure: this recipe has not been run here. Parameters and Adam's moments
alone take 34.5 GiB in float32.
"""

from experiments.configs._paper import paper_config
from parscale.config import Config


def get_config() -> Config:
    return paper_config(width=2048, mlp_width=11008)
