"""The paper's 1.6B shape: N = 1,571,472,384 with one stream, 1,595,669,000 with eight.

    python -m experiments.train --config=paper_1b6 --config.model.streams=8 --workdir=paper_1b6

Reads `corpus/` (made by experiments.prepare_data from your own text) and Qwen2.5's `tokenizer.json`
in the current folder; --config.data.corpus and --config.data.tokenizer name others.
What of the recipe was published and what is our choice: experiments/configs/_paper.py.

Hardware, time and expected figure: this recipe has not been run here. Parameters and Adam's moments
alone take 20.2 GiB in float32.
"""

from experiments.configs._paper import paper_config
from parscale.config import Config


def get_config() -> Config:
    return paper_config(width=1536, mlp_width=8320)
