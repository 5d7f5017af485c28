"""Texts that see each other as they grow, in NumPy, token by token."""

import numpy as np


class Reference:
    """A model of one stream that keeps the keys of texts at positions from 0, in NumPy."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.texts: dict[str, list] = {}  # of each token its keys and values in every layer

    def rotate(self, x, position):
        half = x.shape[-1] // 2
        turn = position * self.config.rope_theta ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(turn), np.sin(turn)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def norm(self, module, x):
        x = x / np.sqrt(np.mean(x**2) + self.config.norm_eps)
        return x * np.asarray(module.scale[...])

    def read(self, tokens: dict[str, int], sees: dict[str, list[str]]) -> dict[str, int]:
        """Appends a token to some texts at once; the most likely next one of each."""
        model, config = self.model.unstack(), self.config
        own = {name: len(self.texts.setdefault(name, [])) for name in tokens}
        for name in tokens:
            self.texts[name].append([])
        x = {name: np.asarray(model.embedding[...])[token] for name, token in tokens.items()}
        for index in range(config.layers):
            layer, queries = model.layers[index], {}
            at = layer.mixer
            for name in tokens:
                y = self.norm(layer.mixer_norm, x[name])
                q, k, v = (
                    np.einsum("d,dnh->nh", y, np.asarray(w[...])) + np.asarray(bias[...])
                    for w, bias in ((at.q, at.q_bias), (at.k, at.k_bias), (at.v, at.v_bias))
                )
                before = sum(len(self.texts[other]) for other in sees[name])
                queries[name] = self.rotate(q, before + own[name])
                self.texts[name][-1].append((self.rotate(k, own[name]), v))
            for name, q in queries.items():
                keys, values, offset = [], [], 0
                for other in [*sees[name], name]:
                    keys += [self.rotate(token[index][0], offset) for token in self.texts[other]]
                    values += [token[index][1] for token in self.texts[other]]
                    offset += len(self.texts[other])
                q = q.reshape(config.kv_heads, -1, config.head_dim)
                scores = np.einsum("kgh,skh->kgs", q, np.array(keys)) * config.head_dim**-0.5
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                out = np.einsum("kgs,skh->kgh", weights, np.array(values))
                y = x[name] + np.einsum("nh,nhd->d", out.reshape(config.heads, -1), at.o[...])
                z = self.norm(layer.mlp_norm, y)
                gate, up = (z @ np.asarray(w[...]) for w in (layer.mlp.gate, layer.mlp.up))
                x[name] = y + (gate / (1 + np.exp(-gate)) * up) @ np.asarray(layer.mlp.down[...])
        head = np.asarray(model.head_weight())
        return {name: int(np.argmax(self.norm(model.norm, x[name]) @ head)) for name in tokens}
