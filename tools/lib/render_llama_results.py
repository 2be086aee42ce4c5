"""Writes what tools/measure_llama measured into docs/results.md, between its marks. Standard library only."""

import json
import math
import pathlib
import re
import statistics
import sys

sys.dont_write_bytecode = True
from evaluation_results import LABELS, by_cell, mean, processor  # noqa: E402

NAMES = LABELS | {"ems": "EMS, merging without log masses"}


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"] + ["| " + " | ".join(r) + " |" for r in rows]


def spread(values, digits):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def speed(data):
    rows = []
    for r in data["llama_speed"]:
        rows.append([f"{r['context']:,}", str(r["rows"]), spread(r["full_tokens_per_s"], 1), spread(r["tokens_per_s"], 1),
                     spread(r["ratio"], 2), f"{r['prefill_with_tap_s'] / r['prefill_s']:.2f}", f"{1e3 * r['compress_s']:.0f}",
                     f"{100 * r['compress_s'] / r['prefill_s']:.2f} %",
                     f"{r['state_bytes_before'] / 1e6:.1f} to {r['state_bytes_after'] / 1e6:.1f}"])
    head = ["tokens read", "rows kept", "full cache, tokens/s", "compressed, tokens/s", "speed-up", "prefill with tap",
            "compress, ms", "of prefill", "state, MB"]
    return [f"{pathlib.Path(data['model']).stem}, f16 cache, {data['threads']} threads, {processor()}. Median (least to most) of "
            f"{data['rounds']} rounds of {data['tokens']} tokens; full and compressed caches take turns. \"Prefill with tap\" is in units of "
            "prefill without; compressing contains saving and loading the state.", ""] + table(head, rows)


def quality(engines):
    settings = engines[0][1]["settings"]
    budgets, methods = settings["budgets"], [m for m in settings["methods"] if m != "full"]
    rows = []
    for method in methods:
        for name, data in engines:
            cells, answers = by_cell(data)
            row = [NAMES.get(method, method), name]
            for b in budgets:
                ratio = math.exp(mean(math.log(r["ratio"]) for r in cells[method, b]))
                row.append(f"{ratio:.3f} / {mean(r['kl'] for r in cells[method, b]):.4f}")
            for b in budgets:
                row.append(f"{100 * answers[method, b][0] / answers[method, b][1]:.0f}")
            rows.append(row)
    full = []
    for name, data in engines:
        _, answers = by_cell(data)
        ppl = math.exp(mean(math.log(d["full_perplexity"]) for d in data["documents"]))
        full.append(f"{ppl:.3f} and {100 * answers['full', 0][0] / answers['full', 0][1]:.0f} % through {name}")
    cases = by_cell(engines[0][1])[1]["full", 0][1]
    head = (["method", "through"] + [f"{b} rows: perplexity / KL" for b in budgets] + [f"{b} rows: right, %" for b in budgets])
    return [f"SmolLM2-135M-Instruct with fp32 weights, {settings['documents']} documents from Dracula and Frankenstein: "
            f"{settings['contexts'][-1]} tokens are read, the cache is compressed, the next {settings['continue']} are predicted from it. "
            "Perplexity is relative to the full cache's, KL the mean divergence from its predictions; needles are "
            f"{cases} questions about numbers hidden in some 1,000 tokens. The full cache: {', '.join(full)}.", ""] + table(head, rows)


def main():
    results, page = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    read = lambda name: json.loads((results / name).read_text(encoding="utf-8"))
    made = {"llama-speed": speed(read("speed.json")),
            "llama-quality": quality([("llama.cpp", read("llama.json")), ("kvfold-evaluate", read("decoder.json"))])}
    text = page.read_text(encoding="utf-8")
    for name, lines in made.items():
        text, count = re.subn(rf"(<!-- results: {name} -->\n).*?(<!-- end of results -->)",
                              lambda m, lines=lines: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"{page} has no place for {name}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
