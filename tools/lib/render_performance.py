"""Writes docs/performance.md from the results in a folder, or notes there what they are measured on.

Two kinds of files are read. Google Benchmark's JSON, whose benchmarks are named stage/model/variant/T:rows/threads:n; and
sections, which parts of the benchmarks write that are measured by other means:

  {"section": "Title", "order": 60, "text": "what was measured, how, in Markdown",
   "tables": [{"caption": "", "columns": ["a", "b"], "rows": [["1", "2"]]}],
   "targets": [{"target": "what was wanted", "measured": "1.2x", "held": true}]}

Text of a section is shown as it is. `order` places it among the stages, which have 10, 20, ... 90; `held` may be null for what is
stated without a target. Nothing is shown that is not in a file.
"""
import argparse
import datetime
import json
import pathlib
import platform
import re
import subprocess

MODELS = {"llama3_8b": "Llama-3-8B (H 8, G 4, D 128)", "qwen2.5_7b": "Qwen2.5-7B (H 4, G 7, D 128)",
          "smollm2_135m": "SmolLM2-135M (H 3, G 3, D 64)", "llama2_7b_8": "8 heads of Llama-2-7B (H 8, G 1, D 128)", "width_128": "rows of 128"}

# stage: (order, title, what is said about it, columns)
TIME = [("median", "time"), ("spread", "spread"), ("floor", "floor"), ("ratio", "time / floor")]
DECODING = TIME + [("share_of_floor", "floor / time"), ("share_of_arithmetic", "arithmetic / time"), ("rows/s", "rows/s"), ("bytes/s", "bytes/s"), ("workspace_bytes", "workspace")]
LENGTHS = [("T:2048", "2k"), ("T:8192", "8k"), ("T:32768", "32k"), ("T:131072", "128k")]
STAGES = {
    "end_to_end": (10, "End to end, window evidence",
                   "Score, budget, tiers, classes, merge and apply of one layer by one call of `compress`: W = 32, gamma = 1, B = 1024 (SmolLM2: 256).",
                   TIME + [("rows/s", "rows/s"), ("speedup", "against 1 thread"), ("floor_speedup", "its floor's"), ("workspace_bytes", "workspace")]),
    "balance": (13, "Balance",
                "How evenly the work of one call is split: tasks run one after the other on one thread, each is timed, and the next goes to whichever of "
                "two pretended workers is free first. \"speed-up\" is what two threads would gain that do not share caches, memory or other work.",
                [("median", "time"), ("spread", "spread"), ("balance", "speed-up")]),
    "shares": (15, "Shares of the stages", "The stages of one layer, run one after the other on one thread: median share of their sum.",
               [("median", "sum"), ("score_share", "score"), ("budget_share", "budget"), ("tiers_share", "tiers"),
                ("classes_share", "classes"), ("merge_share", "merge"), ("apply_share", "apply")]),
    "score_window": (20, "Score by window", "Global-Local scores from the last 32 queries. Workspace: O(tile) per worker and O(H * G * T) floats of column sums.",
                     TIME + [("rows/s", "rows/s"), ("FLOP/s", "FLOP/s"), ("speedup", "against 1 thread"), ("floor_speedup", "its floor's"), ("workspace_bytes", "workspace")]),
    "score_window_lengths": (25, "Score by window, lengths in turn", "The score's time for a row of a head, of layers of several lengths in turn, so that they share the machine's better and "
                             "worse moments: one thread.", LENGTHS),
    "score_global": (30, "Score from all queries",
                     "Exact; exact with the log-sum-exps that the engine's attention has left; and from every 16th query, whose last column compares "
                     "with exact. The floor counts what lies under the causal mask.",
                     TIME + [("FLOP/s", "FLOP/s"), ("speedup", "against 1 thread; sampled: exact"), ("workspace_bytes", "workspace")]),
    "budget": (40, "Budget", "Adaptive budgets over all heads. The floor reads each score and protection once.",
               TIME + [("rows/s", "rows/s"), ("workspace_bytes", "workspace")]),
    "tiers": (45, "Tiers", "Selection of kept rows and candidates, and the tables of the plan. The floor reads or writes each row's entries once.",
              TIME + [("rows/s", "rows/s"), ("workspace_bytes", "workspace")]),
    "classes": (50, "Classes", "Similarities of candidates and centres, and the zero class. The floor compares all pairs; what is less than that is work left out.",
                TIME + [("FLOP/s", "FLOP/s"), ("workspace_bytes", "workspace")]),
    "merge": (55, "Merge", "Merged values and masses, given the classes. The floor reads the members' values and writes the merged rows once.",
              TIME + [("bytes/s", "bytes/s"), ("workspace_bytes", "workspace")]),
    "apply": (57, "Apply", "Moving and writing the kept rows. The floor copies them once.", TIME + [("bytes/s", "bytes/s")]),
    "attend": (60, "Attend", "Decode attention: one query row for each query head. The floor adds up the very bytes that are stored, once, from memory: "
               "each thread has read 64 MB of others before it and before `attend`. "
               "`attend`, which asks for rows ahead, can be faster than that. What is converted is converted "
               "in registers, or in tiles that stay in the cache. Rows of a head lie in one piece, or \"by token\" in a tensor [token][head][dim], or in pages of "
               "such tensors in any order. \"arithmetic\" is another floor: the FLOPs at the speed of Eigen's large products, and "
               "the exps.",
               DECODING),
    "attend_as_compiled": (61, "Attend with what -march allows alone", "Decode attention over rows in blocks once more, without the instructions that kernels ask the processor for (`KVFOLD_ENABLE_DISPATCH=0`).", DECODING),
    "attend_native": (62, "Attend with -march=native", "Decode attention once more, compiled for this very processor (what that adds is said above) instead of for x86-64-v3.", DECODING),
    "conversion": (70, "Conversion", "Stored rows to fp32 in a tile that stays in the cache, 2^19 rows of 128. The floor reads the stored bytes.",
                   TIME + [("rows/s", "rows/s"), ("bytes/s", "bytes/s")]),
    "kernels": (75, "Kernels", "What the stages are made of, on 64 rows of 128 numbers that stay in the first cache, against Eigen's products and exps on the same "
                "numbers as floats: what is stored otherwise is converted by the kernels only. \"numbers/s\" counts the numbers of the rows.",
                [("spread", "spread"), ("numbers/s", "numbers/s"), ("speedup", "against Eigen")]),
}


def si(value, unit=""):
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def seconds(value):
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


FORMATS = {**{length: lambda r, length=length: seconds(r[length]) for length, _ in LENGTHS}, "median": lambda r: seconds(r["seconds"]), "spread": lambda r: f"{100 * r['spread']:.0f} %",
           "floor": lambda r: seconds(r["floor_seconds"]), "ratio": lambda r: f"{r['ratio']:.2f}",
           "speedup": lambda r: f"{r['speedup']:.2f}x", "floor_speedup": lambda r: f"{r['floor_speedup']:.2f}x", "balance": lambda r: f"{r['balance']:.2f}x", "workspace_bytes": lambda r: si(r["workspace_bytes"], "B"),
           "rows/s": lambda r: si(r["rows/s"]), "numbers/s": lambda r: si(r["numbers/s"]), "FLOP/s": lambda r: si(r["FLOP/s"]), "bytes/s": lambda r: si(r["bytes/s"], "B")}
NEEDS = {"median": "seconds", "floor": "floor_seconds"}


def cell(result, column):
    if NEEDS.get(column, column) not in result:
        return ""
    return FORMATS[column](result) if column in FORMATS else f"{100 * result[column]:.1f} %"


def table(columns, rows):
    return ["| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * len(columns)) + " |",
            *("| " + " | ".join(str(c) for c in row) + " |" for row in rows)]


class Results:
    """What the files of a folder say."""

    def __init__(self, folder):
        self.machine, self.sections, self.measured, self.skipped = {}, [], {}, []
        for path in sorted(folder.glob("*.json")):
            data = json.loads(path.read_text(encoding="utf-8"))
            if "section" in data:
                self.sections.append(data)
            elif "machine" in data:
                self.machine = data["machine"]
            else:
                for b in data["benchmarks"]:
                    name = b["name"].split("/iterations:")[0]
                    if variant := re.fullmatch(r"bench_attend(_.*)", path.stem):
                        name = name.replace("/", f"{variant[1]}/", 1)
                    if b.get("error_occurred"):
                        raise SystemExit(f"{path.name}: {name}: {b.get('error_message')}")
                    self.measured[name] = b

    def get(self, stage, model, variant, rows, threads=1):
        return self.measured.get(f"{stage}/{model}/{variant}/T:{rows}/threads:{threads}")

    def of_stage(self, stage):
        for name, result in self.measured.items():
            parts = name.split("/")
            if parts[0] == stage:
                yield MODELS.get(parts[1], parts[1]), parts[2], int(parts[3][2:]), int(parts[4][8:]), result


def stage_section(results, stage):
    order, title, text, columns = STAGES[stage]
    rows = [[model, variant, rows, threads, *(cell(r, c) for c, _ in columns)] for model, variant, rows, threads, r in results.of_stage(stage)]
    if not rows:
        return None
    used = [i for i, (c, _) in enumerate(columns) if any(row[4 + i] for row in rows)]
    heads = ["layer", {"score_global": "kind", "kernels": "kernel"}.get(stage, "storage"), "T", "threads", *(columns[i][1] for i in used)]
    return {"section": title, "order": order, "text": text,
            "tables": [{"columns": heads, "rows": [row[:4] + [row[4 + i] for i in used] for row in rows]}]}


def targets(results):
    """Lines of the table of targets that the stages' results decide: (target, measured, held)."""
    def line(text, wanted, measured, held):
        if all(w is not None for w in wanted):
            yield {"target": text, "measured": measured(*wanted), "held": held(*wanted)}
    get = results.get
    for threads in (1, 2):
        yield from line(f"Window score to apply, T 32k, H 8, G 4, D 128, W 32, B 1024, gamma 1, f16, {threads} thread{'s'[:threads - 1]}: "
                        "at most 1.3x its floor", [get("end_to_end", "llama3_8b", "f16", 32768, threads)],
                        lambda r: f"{r['ratio']:.2f}x ({seconds(r['seconds'])})", lambda r: r["ratio"] <= 1.3)
    for kind, name in (("exact", "Exact global score"), ("given_lse", "Exact global score with log-sum-exps given")):
        yield from line(f"{name}, Llama-3-8B, T 8k: at most 1.3x its floor", [get("score_global", "llama3_8b", kind, 8192)],
                        lambda r: f"{r['ratio']:.2f}x ({seconds(r['seconds'])})", lambda r: r["ratio"] <= 1.3)
    yield from line("Sampled global score, s 16, Llama-3-8B, T 8k: at least 12x cheaper than exact",
                    [get("score_global", "llama3_8b", "sampled_16", 8192)], lambda r: f"{r['speedup']:.1f}x", lambda r: r["speedup"] >= 12)
    yield from line("Linear in T for window evidence, 2k to 128k: ns per row of a head in the score (largest at most 1.3x the smallest)",
                    [get("score_window_lengths", "llama3_8b", "f16", 131072)],
                    lambda r: " / ".join(f"{1e9 * r[length]:.0f}" for length, _ in LENGTHS),
                    lambda r: max(r[length] for length, _ in LENGTHS) <= 1.3 * min(r[length] for length, _ in LENGTHS))
    ends = [get("end_to_end", "llama3_8b", "f16", rows) for rows in (2048, 8192, 32768, 131072)]
    yield from line("The same for the whole, whose classes have a cost that does not depend on T", ends,
                    lambda *rs: " / ".join(f"{1e9 / r['rows/s']:.0f}" for r in rs), lambda *rs: None)
    yield from line("Budget and tiers, Llama-3-8B, T 32k: under 5 % of the whole", [get("shares", "llama3_8b", "f16", 32768)],
                    lambda r: f"{100 * (r['budget_share'] + r['tiers_share']):.1f} %", lambda r: r["budget_share"] + r["tiers_share"] < 0.05)
    for model, rows in (("llama3_8b", 32768), ("smollm2_135m", 32768)):
        yield from line(f"2 threads, {MODELS[model]}, T {rows // 1024}k, end to end: at least 1.8x of 1",
                        [get("end_to_end", model, "f16", rows, 2)], lambda r: f"{r['speedup']:.2f}x", lambda r: r["speedup"] >= 1.8)
        yield from line("The same, at least 90 % of what its floor gains, which is Eigen's products, exps and sums on two threads and one",
                        [get("end_to_end", model, "f16", rows, 2)], lambda r: f"{100 * r['speedup'] / r['floor_speedup']:.0f} % of {r['floor_speedup']:.2f}x",
                        lambda r: r["speedup"] >= 0.9 * r["floor_speedup"])
        yield from line(f"2 threads that do not disturb each other (see Balance), {MODELS[model]}, T {rows // 1024}k: at least 1.8x of 1", [get("balance", model, "f16", rows)],
                        lambda r: f"{r['balance']:.2f}x", lambda r: r["balance"] >= 1.8)
    whole = get("end_to_end", "llama3_8b", "f16", 32768)
    yield from line("Working memory O(tile) + O(H * T): floats of workspace per row of a head at T 32k and 128k, end to end",
                    [whole, get("end_to_end", "llama3_8b", "f16", 131072)],
                    lambda a, b: f"{a['workspace_bytes'] / 4 / 8 / 32768:.1f} / {b['workspace_bytes'] / 4 / 8 / 131072:.1f}",
                    lambda a, b: b["workspace_bytes"] <= 4.4 * a["workspace_bytes"])
    of_floor, of_longer = lambda r: r["share_of_floor"], lambda r: max(r["share_of_floor"], r["share_of_arithmetic"])
    shares_of = lambda share: lambda *rs: " / ".join(f"{100 * share(r):.0f} %" for r in rs)
    for model in ("llama2_7b_8", "llama3_8b"):
        for threads in (1, 2):
            for text, stage, share in ((f"Attend, {MODELS[model]}, T 32k, {threads} thread{'s'[:threads - 1]}: f32, f16 and q8_0 at no less than 70 % of the memory-read floor", "attend", of_floor),
                                       ("The same, no less than 70 % of the longer of reading and arithmetic in fp32", "attend", of_longer),
                                       ("The same, no less than 70 % of the memory-read floor, with -march=native", "attend_native", of_floor)):
                yield from line(text, [get(stage, model, storage, 32768, threads) for storage in ("f32", "f16", "q8_0")],
                                shares_of(share), lambda *rs: all(share(r) >= 0.7 for r in rs))
            yield from line("The same for q8_0, no less than 70 % of the memory-read floor, with what -march allows alone",
                            [get("attend_as_compiled", model, "q8_0", 32768, threads)], shares_of(of_floor), lambda r: of_floor(r) >= 0.7)
    if results.measured:
        calls = sum(r["heap_calls"] for r in results.measured.values())
        yield {"target": f"No heap calls in steady state ({len(results.measured)} benchmarks)", "measured": f"{calls:.0f}", "held": calls == 0}


def render(results):
    sections = [s for s in (stage_section(results, stage) for stage in STAGES) if s] + results.sections
    sections.sort(key=lambda s: (s["order"], s["section"]))
    lines = list(targets(results)) + [t for s in results.sections for t in s.get("targets", [])]
    say = {True: "held", False: "**not held**", None: "stated"}
    out = ["# Performance", "",
           "Made by `tools/bench`; every figure was measured, none is typed. Times are medians, \"spread\" is (90th - 10th percentile) / median. A floor is "
           "what a run cannot avoid, measured in turn with it, in the same process and on as many threads: max(bytes / memory speed, FLOPs / Eigen's "
           "GEMM speed on operands of that shape + exps / Eigen's exp speed). On one thread, time is the thread's own processor time, which other work on the "
           "machine does not count in; on two it is wall time. Rows are made up; scores and classes depend on them, times of "
           "classes and merge therefore too.", ""]
    for key, value in results.machine.items():
        out.append(f"- {key}: {value}")
    out += ["", "## Targets", ""]
    out += table(["target", "measured", ""], [[t["target"], t["measured"], say[t["held"]]] for t in lines])
    for s in sections:
        out += ["", f"## {s['section']}", "", s["text"]]
        for t in s["tables"]:
            out += [""] + ([t["caption"], ""] if t.get("caption") else []) + table(t["columns"], t["rows"])
    return "\n".join(out) + "\n"


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def describe(build, stages, before):
    """The machine, and what runs on it: all, or some stages, and the rest as it ran before."""
    info = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    cpu = name[1].strip() if name else platform.processor()
    adds = [what for flag, what in (("avx512bw", "AVX-512"), ("avx512_vnni", "VNNI for it"), ("avx_vnni", "AVX-VNNI")) if re.search(rf"\b{flag}\b", info)]
    cores = len(re.findall(r"^processor", info, re.MULTILINE))
    cache = (build / "CMakeCache.txt").read_text(encoding="utf-8")
    entry = lambda key: (re.search(rf"^{key}:\w+=(.*)$", cache, re.MULTILINE) or ["", ""])[1]
    march = "native" if entry("KVFOLD_NATIVE") == "ON" else entry("KVFOLD_MARCH") or "the compiler's default"
    asked = march == "x86-64-v3" and re.search(r"\bavx_vnni\b", info)
    commit = run("git", "rev-parse", "--short", "HEAD")
    if run("git", "status", "--porcelain", "--", "include", "bench"):
        commit += " and changes that are not committed"
    if stages and before:
        commit = f"{before['machine']['commit']}; {', '.join(stages)}: {commit}"
    return {"machine": {"machine": f"{cpu}, {cores} cores, {platform.system()}",
                        "compiler": f"{run(entry('CMAKE_CXX_COMPILER'), '--version').splitlines()[0]}, {entry('CMAKE_CXX_FLAGS_RELEASE')}, -march={march}",
                        "asked for at run time": "AVX-VNNI" if asked else "nothing that the compiler may not use anyway",
                        "-march=native adds": ", ".join(adds) or "nothing that kvfold has code for",
                        "commit": commit,
                        "date": datetime.date.today().isoformat()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--out", type=pathlib.Path, help="the page to write")
    group.add_argument("--describe", type=pathlib.Path, metavar="BUILD", help="write machine.json: what is measured, built in BUILD")
    parser.add_argument("--only", nargs="*", default=[], metavar="STAGE", help="with --describe: the stages that are measured")
    args = parser.parse_args()
    if args.describe:
        path = args.results / "machine.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        path.write_text(json.dumps(describe(args.describe, args.only, before), indent=2), encoding="utf-8")
    else:
        args.out.write_text(render(Results(args.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
