"""The paper's 0.7B shape: N = 693,753,856 with one stream, 705,690,632 with eight.

    python -m experiments.train --config=paper_0b7 --config.model.streams=8 --workdir=paper_0b7

Reads `corpus/` (made by experiments.prepare_data from your own text) and Qwen2.5's `tokenizer.json`
in the current folder; --config.data.corpus and --config.data.tokenizer name others.
What of the recipe was published and what is our choice: experiments/configs/_paper.py.

Hardware, time and expected figure: this recipe has not been run here. Parameters and Adam's moments
alone take 9.5 GiB in float32.
"""

from experiments.configs._paper import paper_config
from parscale.config import Config


def get_config() -> Config:
    return paper_config(width=1024, mlp_width=5504)
