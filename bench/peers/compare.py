"""Compares kvfold with kvpress and with PyTorch: agreement first, then times, alternately, in this process."""

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import time
import types

import torch

import ems
import kvfold

def say(text):
    print(text, flush=True)


def make_rows(heads, group, rows, dim, window, seed=1):
    """Keys and values that are redundant in part, as in the other benchmarks: [H, T, D] in fp16, and queries in fp32."""
    random = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=random)
    keys = (noise(heads, 1, dim) + noise(heads, rows, dim)).half()
    places = noise(heads, 64, dim)
    values = (places[:, torch.arange(rows) * 37 % 64] + noise(heads, rows, dim)).half()
    return keys, values, noise(heads, group, window, dim)


def press_module(heads, group, dim):
    """What a press asks of an attention module. Queries are given instead of hidden states, so projecting them is no work."""
    module = torch.nn.Module()
    module.config = types.SimpleNamespace(num_attention_heads=heads * group, num_key_value_heads=heads, _attn_implementation="sdpa")
    module.head_dim, module.q_proj = dim, torch.nn.Identity()
    return module


def press_inputs(queries, dtype):
    """hidden_states and position_embeddings that make a press see `queries` [H, G, W, D] as they are."""
    heads, group, window, dim = queries.shape
    hidden = torch.zeros(1, window + 1, heads * group * dim, dtype=dtype)
    hidden[0, 1:] = queries.reshape(heads * group, window, dim).transpose(0, 1).reshape(window, -1).to(dtype)
    ones = torch.ones(1, window + 1, dim, dtype=dtype)
    return hidden, {"position_embeddings": (ones, torch.zeros_like(ones))}


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def alternate(ours, peers, restore, repetitions):
    """Seconds of `ours` and of each of `peers`, and seconds of processor time, one after the other, `repetitions` times; each once before that."""
    times = {name: [] for name in ("kvfold", *peers)}
    work = {name: [] for name in times}
    for repetition in range(repetitions + 1):
        for name, call in (("kvfold", ours), *peers.items()):
            start, started = time.perf_counter(), time.process_time()
            call()
            seconds, spent = time.perf_counter() - start, time.process_time() - started
            if name == "kvfold":
                restore()
            if repetition > 0:
                times[name].append(seconds)
                work[name].append(spent)
    return times, work


class Report:
    def __init__(self):
        self.rows, self.targets = [], []

    def add(self, what, measured, agreement, target=None, least=None):
        """Takes the fastest of the peers; `least` is the wanted ratio."""
        times, work = measured
        peer = min((n for n in times if n != "kvfold"), key=lambda n: statistics.median(times[n]))
        ratios = [p / k for p, k in zip(times[peer], times["kvfold"])]
        ratio = statistics.median(ratios)
        spread = f"{quantile(ratios, .1):.2f} to {quantile(ratios, .9):.2f}"
        ms = lambda name: f"{1e3 * statistics.median(times[name]):.3g} ms"
        busy = f"{statistics.median(p / k for p, k in zip(work[peer], work['kvfold'])):.2f}x"
        others = ", ".join(f"{n} {ms(n)}" for n in times if n not in ("kvfold", peer))
        self.rows.append([what, ms("kvfold"), f"{ms(peer)} ({peer})", f"{ratio:.2f}x", spread, busy, others, agreement])
        say(f"{what}: kvfold {ms('kvfold')}, {peer} {ms(peer)}: {ratio:.2f}x ({spread}), processor time {busy}; {others}; {agreement}")
        if target:
            self.targets.append({"target": target, "measured": f"{ratio:.2f}x ({spread}; against {peer}; of processor time {busy})",
                                 "held": None if least is None else ratio >= least})

    def write(self, path, text):
        columns = ["work", "kvfold", "fastest peer", "peer / kvfold", "10 % to 90 %", "the same of processor time", "others", "agreement"]
        path.write_text(json.dumps({"section": "Against kvpress and PyTorch", "order": 80, "text": text,
                                    "tables": [{"columns": columns, "rows": self.rows}], "targets": self.targets}, indent=2))


def expect(holds, what):
    if not holds:
        raise SystemExit(f"compare.py: no agreement: {what}")


def compare_ems(report, library, args, heads, group, rows, dim, window, budget):
    keys, values, queries = make_rows(heads, group, rows, dim, window)
    layer = kvfold.Layer(library, keys, values, group, args.threads)
    ours = lambda: layer.call("kvfold_ems", queries, window, budget, 1.0, 0.3)
    ours()
    counts, kept, new_keys, new_values, masses = ems.compress(keys.float(), values.float(), queries, budget)
    same = different = merged = 0
    worst = 0.0
    for h in range(heads):
        positions, our_keys, our_values, our_masses = layer.head(h)
        n = int(counts[h])
        common = set(positions.tolist()) & set(kept[h, :n].tolist())
        same, different = same + len(common), different + len(positions) - len(common)
        if len(common) != len(positions) or n != len(positions):
            continue
        expect(torch.equal(our_keys, new_keys[h, :n]), "keys of kept rows")
        alike = our_masses.sub(masses[h, :n]).abs() < 1e-5  # the same number of members
        merged += int((alike & (our_masses > 0)).sum())
        different += int((~alike).sum())
        worst = max(worst, float((our_values - new_values[h, :n])[alike].abs().max()))
    layer.restore()
    expect(different <= 2e-3 * heads * budget, f"{different} of {heads * budget} rows differ")
    expect(worst < 5e-3 and merged > 0, f"merged values are off by {worst}, {merged} rows were merged")
    peers = {}
    for name, dtype in (("PyTorch f32", torch.float32), ("PyTorch bf16", torch.bfloat16)):
        data = [x.to(dtype) for x in (keys, values, queries)]
        peers[name] = lambda data=data: ems.compress(*data, budget)
    times = alternate(ours, peers, layer.restore, args.repetitions)
    report.add(f"EMS, whole (T {rows}, H {heads}, G {group}, D {dim}, W {window}, B {budget}, gamma 1)", times,
               f"{different} of {same + different} rows differ, {merged} merged rows within {worst:.1e}",
               f"Against the PyTorch rendering of EMS, T {rows // 1024}k, H {heads}, G {group}, D {dim}, W {window}, B {budget}, "
               f"gamma 1, {args.threads} threads: at least 3x", 3.0)


def compare_presses(report, library, args, heads, group, rows, dim, window, budget, merging_rows):
    from kvpress import AdaKVPress, MergingPress, SnapKVPress

    def inputs(rows):
        keys, values, queries = make_rows(heads, group, rows, dim, window)
        layer = kvfold.Layer(library, keys, values, group, args.threads)
        module = press_module(heads, group, dim)
        ratio = 1.0 - budget / rows
        data = {}
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            data[name] = (*press_inputs(queries, dtype), keys.to(dtype).unsqueeze(0), values.to(dtype).unsqueeze(0))
        call = lambda press, name: press.compress(module, data[name][0], data[name][2], data[name][3], None, data[name][1])
        return queries, layer, module, ratio, data, call

    queries, layer, module, ratio, data, call = inputs(rows)
    snapkv = SnapKVPress(compression_ratio=ratio, window_size=window, kernel_size=5)

    # Scores: kvfold sums over the window, kvpress averages; the pool's border counts rows that are not there in kvpress.
    hidden, embeddings, keys, values = data["f32"]
    theirs = snapkv.score(module, hidden, keys, values, None, embeddings)[0, :, 2:rows - window - 2]
    ours = layer.scores("kvfold_snapkv_scores", queries, window)[:, 2:rows - window - 2] / window
    error = float(((ours - theirs).abs() / theirs.abs().max()).max())
    expect(error < 1e-5, f"scores of SnapKV are off by {error}")
    times = alternate(lambda: layer.call("kvfold_snapkv", queries, window, budget),
                      {f"kvpress {n}": (lambda n=n: call(snapkv, n)) for n in data}, layer.restore, args.repetitions)
    report.add(f"SnapKVPress (T {rows}, B {budget})", times, f"scores within {error:.1e} of the largest",
               f"Against kvpress's SnapKV, T {rows // 1024}k: stated")

    adakv = AdaKVPress(SnapKVPress(compression_ratio=ratio, window_size=window, kernel_size=5), alpha_safeguard=0.2)
    call(adakv, "f32")
    _, masked_heads, masked_rows = module.masked_key_indices
    kept = torch.ones(heads, rows, dtype=torch.bool)
    kept[masked_heads, masked_rows] = False
    layer.call("kvfold_ada_snapkv", queries, window, budget, 0.2)
    common = sum(int(kept[h, layer.head(h)[0]].sum()) for h in range(heads))
    layer.restore()
    share = common / (heads * budget)
    expect(share > 0.95, f"only {share:.3f} of the rows that AdaKV keeps are the same")
    times = alternate(lambda: layer.call("kvfold_ada_snapkv", queries, window, budget, 0.2),
                      {f"kvpress {n}": (lambda n=n: call(adakv, n)) for n in data}, layer.restore, args.repetitions)
    report.add(f"AdaKVPress of SnapKV, which only masks rows (T {rows}, B {budget})", times,
               f"{100 * share:.1f} % of the kept rows in common; shares are normalised in kvfold, not in kvpress")
    del layer, data, call

    queries, layer, module, ratio, data, call = inputs(merging_rows)
    merging = MergingPress(SnapKVPress(compression_ratio=ratio, window_size=window, kernel_size=5))
    gamma = merging_rows / budget - 1.0
    times = alternate(lambda: layer.call("kvfold_ems", queries, window, budget, gamma, 0.0),
                      {f"kvpress {n}": (lambda n=n: call(merging, n)) for n in data}, layer.restore, max(2, args.repetitions // 2))
    report.add(f"MergingPress of SnapKV, EMS with as many candidates: every row (T {merging_rows}, B {budget})", times,
               "other rules: kvfold compares keys and values and has masses")


def compare_observed(report, library, args, heads, group, rows, dim, budget):
    from kvpress import ObservedAttentionPress
    keys, values, _ = make_rows(heads, group, rows, dim, 1)
    weights = torch.randn(heads * group, rows, rows, generator=torch.Generator().manual_seed(3))
    weights = torch.softmax(weights.masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu(1), float("-inf")), dim=-1)
    layer = kvfold.Layer(library, keys, values, group, args.threads)
    module = press_module(heads, group, dim)
    press = ObservedAttentionPress(compression_ratio=1.0 - budget / rows)
    attentions, seen = weights.unsqueeze(0), torch.arange(rows, 0, -1)
    data = (keys.float().unsqueeze(0), values.float().unsqueeze(0))
    theirs = press.score(module, None, *data, attentions, {})[0]
    ours = layer.scores("kvfold_h2o_scores", weights) / seen
    error = float(((ours - theirs).abs() / theirs.abs().max()).max())
    expect(error < 1e-5, f"scores of observed attention are off by {error}")
    times = alternate(lambda: layer.call("kvfold_h2o", weights, budget),
                      {"kvpress f32": lambda: press.compress(module, None, *data, attentions, {})}, layer.restore, args.repetitions)
    report.add(f"ObservedAttentionPress, column sums of given weights (T {rows}, B {budget})", times,
               f"scores within {error:.1e} of the largest")


def compare_attention(report, library, args, heads, group, rows, dim):
    keys, values, _ = make_rows(heads, group, rows, dim, 1)
    queries = torch.randn(heads * group, 1, dim, generator=torch.Generator().manual_seed(5))
    attention = torch.nn.functional.scaled_dot_product_attention
    peers = {}
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        data = [x.to(dtype).unsqueeze(0) for x in (queries, keys, values)]
        peers[f"SDPA {name}"] = lambda data=data: attention(*data, enable_gqa=True)
    wanted = attention(queries.unsqueeze(0), keys.float().unsqueeze(0), values.float().unsqueeze(0), enable_gqa=True)[0]
    for storage in kvfold.STORAGES:
        cache = kvfold.Cache(library, storage, keys.float(), values.float(), group, args.threads)
        out = torch.empty(heads * group, 1, dim)
        cache.attend(queries, out)
        error = float((out - wanted).abs().max() / wanted.abs().max())
        expect(error < (0.02 if storage == "q8_0" else 1e-5), f"attention over {storage} is off by {error}")
        chosen = {n: f for n, f in peers.items() if storage == "q8_0" or n == f"SDPA {storage}" or (storage, n) == ("f16", "SDPA bf16")}
        times = alternate(lambda: cache.attend(queries, out), chosen, lambda: None, args.repetitions)
        report.add(f"decode attention over {storage} (T {rows})", times, f"within {error:.1e} of the largest, of SDPA in f32")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--compiled", default="", help="what the library was compiled for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    library, report = kvfold.load(args.library), Report()
    if args.quick:
        args.repetitions = 1
        sizes = {"ems": 2048, "press": 2048, "merging": 1024, "observed": 512, "attention": 2048, "budget": 256}
    else:
        sizes = {"ems": 32768, "press": 32768, "merging": 8192, "observed": 2048, "attention": 32768, "budget": 1024}
    shape = {"heads": 8, "group": 4, "dim": 128}
    compare_ems(report, library, args, rows=sizes["ems"], window=32, budget=sizes["budget"], **shape)
    compare_attention(report, library, args, rows=sizes["attention"], **shape)
    compare_presses(report, library, args, rows=sizes["press"], window=32, budget=sizes["budget"], merging_rows=sizes["merging"], **shape)
    compare_observed(report, library, args, rows=sizes["observed"], budget=sizes["observed"] // 4, **shape)
    report.write(args.out, (
        f"One layer of Llama-3-8B, {args.threads} threads on both sides, run in turn in one process ({args.repetitions} times, medians; the ratio is that of "
        f"neighbours in time). kvfold compiled for {args.compiled or 'the default processor'}, storage f16; PyTorch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()} "
        f"instructions, in f32 and in bf16, of which the faster counts; kvpress {importlib.metadata.version('kvpress')}. Both sides are given "
        "queries after RoPE, and must agree before they are timed. Peers return new tensors, kvfold writes into the cache. "
        "The PyTorch rendering of EMS is bench/peers/ems.py."))


if __name__ == "__main__":
    main()
