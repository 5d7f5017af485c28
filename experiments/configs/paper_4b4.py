"""The paper's 4.4B shape: N = 4,353,203,200 with one stream, 4,414,502,408 with eight.

    python -m experiments.train --config=paper_4b4 --config.model.streams=8 --workdir=paper_4b4

Reads `corpus/` (made by experiments.prepare_data from your own text) and Qwen2.5's `tokenizer.json`
in the current folder; --config.data.corpus and --config.data.tokenizer name others.
What of the recipe was published and what is our choice: experiments/configs/_paper.py.

Hardware, time and expected figure: this recipe has not been run here. Parameters and Adam's moments
alone take 53.0 GiB in float32.
"""

from experiments.configs._paper import paper_config
from parscale.config import Config


def get_config() -> Config:
    return paper_config(width=2560, mlp_width=13824)
