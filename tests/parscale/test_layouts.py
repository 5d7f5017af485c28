"""Layouts: every token that they generate is the model's choice, given who sees whom, and where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_models import make_writer
from flax import nnx

from models.config import ModelConfig
from models.segments import Segment, lay_out
from pallas_kernels.masks import Mask
from parscale import layout_text, layouts
from parscale.engine import Engine, Request
from parscale.layouts import Ape, Hogwild, Multiverse, ParaThinker, ThreadWeaver
from parscale.tokenizers import ByteTokenizer
from sharding.settings import InputError

CONFIG = ModelConfig(
    vocab_size=260, width=32, layers=1, heads=4, kv_heads=2, mlp_width=48, streams=2,
    transform_size=4, max_length=256, branches=3, rope_theta=100.0,
)  # fmt: skip
NEVER = (259,)  # a token that the model does not write
REST = ("contiguous", "combined")
PATHS = ((11, 12), (13,), (14, 15, 16))


def run(layout, prompt, tokens, model=None, until=()):
    """The result of a request, and what each of its branches generated, write after write."""
    engine = Engine(model or make_writer(CONFIG), cache_tokens=8192)
    engine.submit(Request(prompt, tokens, layout=layout, until=frozenset(until)))
    branches: dict[int, list[int]] = {}
    while not engine.idle:
        for event in engine.step():
            branches.setdefault(event.branch, []).extend(event.tokens)
            result = event.result
    if result.error is not None:
        raise result.error
    assert engine.memory.held == 0
    return result, branches


@jax.jit
def choices(ids, positions, runs, marks):
    graph, params = nnx.split(make_writer(CONFIG))
    logits = nnx.merge(graph, params)(
        ids[None], positions=positions[None], mask=Mask(runs, causal=True), branches=marks[None]
    )
    return jnp.argmax(logits[0], -1)


def check(segments: list[tuple], marks=()) -> None:
    """Every generated token is the choice after those that it follows.

    Args:
      segments: of each the given tokens, the generated ones, and the segments before.
      marks: of each segment; 0 for those that are missing.
    """
    described = [Segment((*given, *new), after) for given, new, after in segments]
    layout = lay_out(described)
    marks = np.array([*marks, *[0] * (len(segments) - len(marks))])[layout.segments]
    pad = -len(layout.ids) % 64  # few lengths are compiled
    runs = np.pad(layout.runs, ((0, 4 - len(layout.runs)), (0, 0), (0, pad)))
    ids, positions, marks = (np.pad(x, (0, pad)) for x in (layout.ids, layout.positions, marks))
    best = choices(ids, positions, runs, marks)
    for number, (given, new, _) in enumerate(segments):
        places = np.flatnonzero(layout.segments == number)[len(given) :]
        assert [int(best[layout.before[place]]) for place in places] == list(new)
    assert any(new for _, new, _ in segments)


def plain_text(prompt, tokens):
    return run(layouts.plain, prompt, tokens)[0].tokens


def a_prompt_that_forks(letters: int) -> tuple[list[int], list[int]]:
    """A prompt, and the first tokens after it, of which the last does not occur before."""
    for seed in range(100):
        prompt = np.random.default_rng(seed).integers(97, 123, 6).tolist()
        new = plain_text(prompt, letters)
        if new[-1] not in new[:-1] and new.count(new[0]) <= len(PATHS):
            return prompt, new
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("kind", [Multiverse, ThreadWeaver])
def test_paths_that_the_model_asks_for(kind):
    prompt, new = a_prompt_that_forks(4)
    count = new.count(new[0])
    layout = kind((new[-1],), (new[0],), PATHS, NEVER, (17, 18), most=5)
    result, branches = run(layout, prompt, 8)
    paths = [branches[1 + number] for number in range(count)]
    segments = [(prompt, new, ())]
    segments += [(begin, path, (0,)) for begin, path in zip(PATHS, paths, strict=False)]
    whole = [token for begin, path in zip(PATHS, paths, strict=False) for token in (*begin, *path)]
    if kind is Multiverse:
        last = branches[1 + count]
        segments.append(((17, 18), last, tuple(range(1, 1 + count))))
    else:
        last = branches[1][5:]
        segments[1] = (PATHS[0], branches[1][:5], (0,))
        again = whole[len(PATHS[0]) + 5 :] if count > 1 else []
        whole = [*PATHS[0], *branches[1][:5], *again]
        segments.append(((*again, 17, 18), last, (1,)))
    check(segments)
    assert result.tokens == [*new, *whole, 17, 18, *last]
    assert result.ledger.generated == 4 + 5 * count + 4
    assert result.ledger.longest == 4 + 5 + 4


def test_paths_that_are_read_again_are_waited_for():
    layout = ThreadWeaver(NEVER, NEVER, PATHS, NEVER, (17,), most=9)

    def script(root, request):
        yield [root.write(request.prompt, 2)]
        paths = root.fork(2)
        yield [paths[0].write([11], 2), paths[1].write([12], 9)]
        last, begin = layout.join([[11, *paths[0].new], [12, *paths[1].new]], paths)
        yield [last.write(begin, 3)]

    assert run(script, [97, 99, 104, 110], 1)[0].ledger.longest == 2 + 9 + 3


@pytest.mark.slow
def test_paths_fork_again():
    prompt, new = a_prompt_that_forks(3)
    again = (new[-1],)
    layout = Multiverse(again, again, PATHS, NEVER, (17,), most=9)
    result, branches = run(layout, prompt, 12)
    begun, joined = result.tokens.count(11), result.tokens.count(17)
    # Every path has a branch, every conclusion another.
    assert len(branches) == 1 + begun + joined
    generated = sum(map(len, branches.values()))
    assert result.ledger.generated == generated
    assert len(result.tokens) == generated + 2 * begun + joined
    # A tag without an outline before it is text.
    silent = dataclasses.replace(layout, outline=NEVER)
    assert run(silent, prompt, 12)[0].tokens == plain_text(prompt, 12)


@pytest.mark.parametrize("first_ends", [False, True])
def test_thoughts_and_their_summary(first_ends):
    prompt = [97, 99, 104, 110]
    free = ParaThinker(PATHS, (NEVER,), (17, 18), 7)
    _, branches = run(free, prompt, 6)
    thoughts = [branches[1 + number] for number in range(3)]
    segments = [(prompt, (), ())]
    segments += [(begin, new, (0,)) for begin, new in zip(PATHS, thoughts, strict=True)]
    segments.append(((17, 18), branches[4], (1, 2, 3)))
    if not first_ends:
        check(segments, marks=(0, 1, 2, 3))
        return
    # The first of the thoughts to write this token stops the others.
    end = thoughts[1][2]
    layout = dataclasses.replace(free, ends=((end,),), first_ends=True)
    result, stopped = run(layout, prompt, 6)
    most = min(new.index(end) + 1 if end in new else 7 for new in thoughts)
    assert [stopped[1 + number] for number in range(3)] == [new[:most] for new in thoughts]
    assert result.ledger.longest == most + 6


def test_contexts_read_apart():
    shared, contexts, query = (97, 98), ((99, 100, 101), (110,), (111, 112)), [120, 121]
    layout = Ape(shared, contexts, temperature=1.0, scale=1.0)
    result, _ = run(layout, query, 6)
    check([
        (shared, (), ()), *((context, (), (0,)) for context in contexts),
        (query, result.tokens, (1, 2, 3)),
    ])  # fmt: skip
    # A part of its own at temperature and scale 1 is no part at all; others change the text.
    close = dataclasses.replace(layout, scale=1 + 1e-7)
    assert run(close, query, 6)[0].tokens == result.tokens
    far = dataclasses.replace(layout, temperature=0.2, scale=2.0)
    assert run(far, query, 12)[0].tokens != run(layout, query, 12)[0].tokens


@pytest.mark.parametrize("settings", [(1.0, 1.0), (0.2, 3.0)])
def test_one_context_is_read_as_it_stands(settings):
    context, query = (99, 100, 101, 115), [120, 121]
    found = run(Ape((), (context,), *settings), query, 8)[0].tokens
    same = found == plain_text([*context, *query], 8)
    assert same == (settings == (1.0, 1.0))


@pytest.mark.parametrize(
    "arrangement", ["interleaved", *(pytest.param(x, marks=pytest.mark.slow) for x in REST)]
)
def test_one_worker_writes_alone(arrangement):
    prompt, begin = [97, 99, 104, 110], (11, 12)
    layout = Hogwild((begin,), arrangement, step=NEVER)
    found, _ = run(layout, prompt, 9)
    plain = plain_text([*prompt, *begin], 9)
    assert found.tokens == [*begin, *plain]
    if arrangement == "contiguous":
        return
    # Its finished steps move to what all see; their keys then stand where they would have stood.
    step = (plain[2],)
    parts, text = [], [*prompt]
    while sum(map(len, parts)) < 9:
        text += begin
        new = plain_text(text, 9 - sum(map(len, parts)))
        new = new[: new.index(step[0]) + 1] if step[0] in new else new
        parts.append(new)
        text += new
    found, _ = run(dataclasses.replace(layout, step=step), prompt, 9)
    assert found.tokens == [token for part in parts for token in (*begin, *part)]


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ["contiguous", "interleaved", "combined"])
def test_workers_write_all_their_tokens(arrangement):
    layout = Hogwild(PATHS, arrangement, step=(101,), others=(20, 21), own=(22,))
    result, branches = run(layout, [97, 99, 104, 110], 9)
    assert result.ledger.generated == 27
    assert len(result.tokens) >= 27 + sum(map(len, PATHS))
    assert sorted(map(len, branches.values()))[-3:] == [9, 9, 9]
    if arrangement == "contiguous":
        assert result.ledger.longest == 9


def test_streams_that_are_alike_may_share_a_prompt():
    graph, params = nnx.split(make_writer(CONFIG))
    params = nnx.to_pure_dict(params)
    prefix = params["layers"]["mixer"]["streams"]
    for name in prefix:
        prefix[name] = jnp.broadcast_to(prefix[name][:, :1], prefix[name].shape)
    alike = nnx.merge(graph, params)
    prompt = [97, 99, 104, 110, 120, 98]
    expected = run(layouts.plain, prompt, 10, alike)[0].tokens
    assert run(layouts.shared_prompt, prompt, 10, alike)[0].tokens == expected
    assert run(layouts.shared_prompt, prompt[:1], 10, alike)[0].tokens


def test_scripts_side_by_side():
    def script(name, steps):
        for step in range(steps):
            yield [f"{name}{step}"]
        return name

    def whole():
        names = yield from layouts.beside(script("a", 2), script("b", 0), script("c", 3))
        yield names

    assert list(whole()) == [["a0", "c0"], ["a1", "c1"], ["c2"], ["a", "b", "c"]]


def test_descriptions():
    tokenizer = ByteTokenizer()
    assert layout_text.read("plain", tokenizer) is layouts.plain
    assert layout_text.read('{"name": "shared_prompt"}', tokenizer) is layouts.shared_prompt
    text = '{"name": "ape", "shared": "a", "contexts": ["bc", "d"], "scale": 1}'
    assert layout_text.read(text, tokenizer) == Ape((97,), ((98, 99), (100,)), 0.9, 1.0)
    for name in ("multiverse", "threadweaver", "parathinker", "hogwild"):
        layout = layout_text.read(name, tokenizer)
        assert isinstance(layout, layout_text.CLASSES[name])
    assert layout_text.read("multiverse", tokenizer).end == tuple(b"</Path>")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("multivers", r"layout 'multivers': expected one of .* \(did you mean .multiverse"),
        ('{"name": 3}', "layout 3: expected one of"),
        ('{"name": "plain", "most": 3}', "layout plain has no fields; most was given"),
        ('{"name": "ape", "context": []}', r"no field 'context', only .* \(did you mean .contexts"),
        ("ape", "layout ape: its field shared is missing"),
        ('{"name": "ape", "shared": 1, "contexts": []}', "layout ape: shared=1: expected text"),
        ('{"name": "hogwild", "workers": "a"}', "workers='a': expected a list of texts"),
        ('{"name": "hogwild", "workers": []}', r"workers=\(\): expected some"),
        ('{"name": "hogwild", "arrangement": "x"}', "arrangement=x: expected one of contiguous"),
        ('{"name": "hogwild", "arrangement": "combined"}', "a step needs an end"),
        ('{"name": "parathinker", "most": "x"}', "most='x': expected int"),
        ('{"name": "parathinker", "first_ends": 1}', "first_ends=1: expected bool"),
        ('{"name": "ape", "shared": "", "contexts": ["a"], "temperature": 0}', "temperature=0.0: "),
    ],
)
def test_descriptions_that_say_nothing(text, words):
    with pytest.raises(InputError, match=words):
        layout_text.read(text, ByteTokenizer())
