"""What must stay true of a mixture: exact shares, evenly spread, a function of (seed, index), in constant memory."""

import fractions
import json
import random
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import inside, read_log, refused, train

from dataloader import FileRows, Mixture, count_draws, locate, open_rows, parse_mixture
from evaluate import METRICS

KNOBS = SimpleNamespace(tasks='ocr', augment='')


class Rows:
    """So many conversations that take no memory."""

    def __init__(self, name, n):
        self.name = name
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {'messages': [{'role': 'user', 'content': self.name}, {'role': 'assistant', 'content': str(i)}]}


def make_mixture(spec, sizes, seed=5):
    sources = parse_mixture(spec)
    return Mixture(sources, [Rows(source.name, n) for source, n in zip(sources, sizes)], KNOBS, seed)


def draw(mixture, indices):
    """[(source, row)]"""
    return [tuple(message['content'] for message in mixture[i]['messages']) for i in indices]


def test_draws_are_in_the_order_of_their_times():
    """Against a sort of all of them."""
    rng = random.Random(0)
    for _ in range(100):
        counts = [rng.randint(1, rng.choice([3, 30, 300])) for _ in range(rng.randint(1, 12))]
        draws = [(i, k) for i, count in enumerate(counts) for k in range(count)]
        draws.sort(key=lambda draw: fractions.Fraction(2 * draw[1] + 1, 2 * counts[draw[0]]))
        assert [locate(position, counts) for position in range(sum(counts))] == draws


def test_passes_are_exact_and_a_third_of_a_source_is_another_third_each_epoch():
    mixture = make_mixture('a:1 b:0.3 c:2', [50, 100, 10])
    assert mixture.counts == [50, 30, 20]
    epochs = [draw(mixture, range(100 * e, 100 * e + 100)) for e in range(10)]
    for epoch in epochs:
        assert Counter(name for name, _ in epoch) == {'a': 50, 'b': 30, 'c': 20}
        assert set(Counter(row for name, row in epoch if name == 'c').values()) == {2}
    assert len({row for epoch in epochs[:3] for name, row in epoch if name == 'b'}) == 90
    rows_of_b = Counter(row for epoch in epochs for name, row in epoch if name == 'b')
    assert len(rows_of_b) == 100 and set(rows_of_b.values()) == {3}


def test_sources_are_evenly_spread():
    mixture = make_mixture('a:1 b:1 c:1', [600, 300, 100])
    for start in range(0, 1000, 50):
        counts = Counter(name for name, _ in draw(mixture, range(start, start + 50)))
        assert abs(counts['a'] - 30) <= 2 and abs(counts['b'] - 15) <= 2 and abs(counts['c'] - 5) <= 2


def test_shares_of_twelve_sources_after_100000_draws():
    spec = 'a:1 b:0.3 c:2 d@0.2 e@0.05 f:0.01 g:1 h:0.5 i:3 j@0.1 k:1 l:1'
    sizes = [1000, 20_000, 500, 7, 10_000_000, 90_000, 2000, 100, 300, 50, 1, 800]
    mixture = make_mixture(spec, sizes)
    counts = Counter(name for name, _ in draw(mixture, range(100_000)))
    passes = {'a': 1000, 'b': 6000, 'c': 1000, 'f': 900, 'g': 2000, 'h': 50, 'i': 900, 'k': 1, 'l': 800}
    shares = {name: 0.65 * n / sum(passes.values()) for name, n in passes.items()} | {'d': 0.2, 'e': 0.05, 'j': 0.1}
    for name, share in shares.items():
        assert abs(counts[name] / 100_000 - share) < 0.005
    assert counts['d'] / 100_000 == pytest.approx(0.2, abs=0.0005)


def test_the_seed_chooses_the_order_and_nothing_else_does():
    mixture, again, other = (make_mixture('a:1 b@0.5', [40, 30], seed) for seed in (5, 5, 6))
    order = draw(mixture, range(200))
    assert draw(again, reversed(range(200))) == order[::-1]
    assert draw(other, range(200)) != order
    assert [name for name, _ in draw(other, range(200))] == [name for name, _ in order]


def test_memory_stays_the_same_while_rows_grow_a_hundredfold():
    def peak(sizes):
        mixture = make_mixture('a:1 b:0.3 c@0.2', sizes)
        mixture[0]
        tracemalloc.start()
        draw(mixture, range(500, 1000))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small = peak([10**5, 10**5, 10**3])
    assert abs(peak([10**7, 10**7, 10**5]) - small) < 30_000


@pytest.mark.parametrize('spec, message', [
    ('', 'one or more'), ('a a:2', 'each once'), ('a:0 b', 'above 0'), ('a@0', 'above 0'), ('a:x', "got 'a:x'"),
    ('a:1:most', "got 'a:1:most'"), ('a:1.2.3', "got 'a:1.2.3'")])
def test_a_wrong_mixture_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(spec)


def test_shares_that_do_not_add_up_are_refused():
    assert count_draws(parse_mixture('a@0.25 b@0.75'), [100, 60]) == [40, 120]
    for spec in ('a@1.5 b', 'a@0.5', 'a@0.5 b@0.6', 'a@0.5 b@0.3', 'a:1 b@0.7 c@0.4'):
        with pytest.raises(ValueError, match='the shares of a mixture are'):
            count_draws(parse_mixture(spec), [100, 100, 100])


# -----------------------------------------------------------------------------
# runs

@pytest.fixture
def sources(tmp_path):
    """Twelve small sources: conversations, texts, one of them in the loss as a whole."""
    names = []
    for number in range(12):
        folder = tmp_path / f's{number}'
        folder.mkdir()
        for split, n in (('train', 5 + number), ('val', 3)):
            with open(folder / f'{split}.jsonl', 'w') as f:
                for i in range(n):
                    row = {'text': f'{split} text {i} of {number}. ' * 3}
                    if number % 3:
                        row = {'messages': [{'role': 'user', 'content': f'{split} {i} {number}?'},
                                            {'role': 'assistant', 'content': f'Yes {i * number}.'}], 'metric': 'final_number'}
                    print(json.dumps(row), file=f)
        names.append(f'{folder}:{"0.5" if number % 2 else "1"}{":all" if number == 4 else ""}')
    names[5] = str(tmp_path / 's5') + '@0.1'
    return ' '.join(names)


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('packing', [False, True])
def test_a_mixture_resumes_exactly_and_reports_every_source(sources, tmp_path, processes, packing):
    knobs = [f'--dataset={sources}', '--gradient_accumulation_steps=2', f'--packing={packing}', '--eval_samples=12',
             '--tasks=ocr:0.5 text:0.5', '--text_dataset=pydoc', '--block_size=64', '--eval_interval=4']
    n_processes = processes if processes > 1 else 0
    straight = train(tmp_path / 'a', *knobs, processes=n_processes)
    assert straight.returncode == 0, straight.stderr
    stopped = train(tmp_path / 'b', *knobs, '--max_iters=2', processes=n_processes)
    assert stopped.returncode == 0, stopped.stderr
    resumed = train(tmp_path / 'b', *knobs, '--init_from=resume', processes=n_processes)
    assert resumed.returncode == 0, resumed.stderr
    losses = [row['loss'] for row in read_log(tmp_path / 'a') if 'loss' in row]
    assert losses[-2:] == [row['loss'] for row in read_log(tmp_path / 'b') if 'loss' in row][-2:]
    weights = [torch.load(tmp_path / run / 'ckpt.pt', weights_only=True)['model'] for run in 'ab']
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())
    result = read_log(tmp_path / 'a')[-1]['eval']
    assert len(result['sources']) == 12 and 'text_loss' in result
    for number, own in enumerate(result['sources'].values()):
        assert own['val_loss'] > 0 and ('final_number' in own) == bool(number % 3)
    assert 's11: val_loss' in straight.stderr


def test_two_processes_see_the_examples_of_one(sources, tmp_path):
    knobs = [f'--dataset={sources}', '--gradient_accumulation_steps=2', '--tasks=text', '--block_size=64']
    logs = []
    for processes in (0, 2):
        process = train(tmp_path / str(processes), *knobs, processes=processes)
        assert process.returncode == 0, process.stderr
        logs.append([row['loss'] for row in read_log(tmp_path / str(processes)) if 'loss' in row])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_what_is_in_the_loss_is_chosen_for_each_source(sources):
    sources = parse_mixture(sources)
    rows = [FileRows(f'{source.name}/train.jsonl') for source in sources]
    mixture = Mixture(sources, rows, SimpleNamespace(tasks='text', augment='', min_span=5, max_span=60), 0)
    examples = [mixture[i] for i in range(sum(mixture.counts))]
    chosen = Counter(example.get('loss_on') for example in examples if 'messages' in example)
    assert chosen['all'] == mixture.counts[4] and chosen[None] > chosen['all']


def test_a_missing_source_is_named(tmp_path):
    refused(train(tmp_path / 'a', '--dataset=pydoc:1 nothing:2'), "no dataset 'nothing'", 'prepare_data.py nothing')


def test_a_mixture_is_evaluated_by_source(tmp_path, run_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 's').mkdir()
    turns = [{'role': 'user', 'content': 'How many?'}, {'role': 'assistant', 'content': '#### 5'}]
    for split in ('train', 'val'):
        (tmp_path / 's' / f'{split}.jsonl').write_text(json.dumps({'messages': turns, 'metric': 'final_number'}) + '\n')
    process = inside('sample.py', f'--out_dir={run_dir}', '--eval=pydoc@0.5 s@0.5', '--eval_samples=4', '--device=cpu')
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert set(result['sources']) == {'pydoc', 's'} and 'final_number' in result['sources']['s']
    values = [own['val_loss'] for own in result['sources'].values()]
    assert min(values) < result['val_loss'] < max(values)


def test_overfit_trains_and_evaluates_on_the_same_first_rows(tmp_path, monkeypatch):
    """config/overfit.py, for two steps: one example of each of ten tasks, all of them scored."""
    process = inside('train.py', 'config/overfit.py', f'--out_dir={tmp_path}', '--max_iters=2', '--eval_interval=2',
                     '--n_layer=1', '--vision_n_layer=1', '--device=cpu', '--compile=False', '--num_workers=0')
    assert process.returncode == 0, process.stderr
    first, last = (row['eval'] for row in read_log(tmp_path) if 'eval' in row)
    assert last['val_loss'] < first['val_loss'] and last['n'] == 10
    assert {'edit_similarity', 'relaxed_accuracy', 'yes_no', 'teds', 'letter', 'final_number'} <= set(last)
    rows = open_rows('assets/tasks', 'val', overfit_rows=3)
    assert [rows[i] for i in range(3)] == [open_rows('assets/tasks', 'train', 3)[i] for i in range(3)] and len(rows) == 3
    assert {row['metric'] for row in FileRows('assets/tasks/train.jsonl') if 'metric' in row} <= set(METRICS)
