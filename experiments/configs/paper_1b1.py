"""The paper's 1.1B shape: N = 1,088,376,320 with one stream, 1,105,918,728 with eight.

    python -m experiments.train --config=paper_1b1 --config.model.streams=8 --workdir=paper_1b1

Reads `corpus/` (made by experiments.prepare_data from your own text) and Qwen2.5's `tokenizer.json`
in the current folder; --config.data.corpus and --config.data.tokenizer name others.
What of the recipe was published and what is our choice: experiments/configs/_paper.py.

Hardware, time and expected figure: this recipe has not been run here. Parameters and Adam's moments
alone take 14.3 GiB in float32.
"""

from experiments.configs._paper import paper_config
from parscale.config import Config


def get_config() -> Config:
    return paper_config(width=1280, mlp_width=6912)
