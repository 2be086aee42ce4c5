"""What the pages and pictures of kvfold-evaluate's results share. Standard library only."""

import collections
import pathlib
import platform

LABELS = {"streaming-llm": "StreamingLLM", "h2o": "H2O", "snapkv": "SnapKV", "tova": "TOVA",
          "ems-evict": "EMS score, eviction only", "ems-window": "EMS, window evidence", "ems": "EMS",
          "full": "full cache"}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def by_cell(data):
    """{(method, budget): results}, and {(method, budget): [correct, cases]} of all tasks (full cache: budget 0)."""
    cells, answers = collections.defaultdict(list), collections.defaultdict(lambda: [0, 0])
    for r in data["results"]:
        cells[r["method"], r["budget"]].append(r)
    for a in data["tasks"]:
        key = a["method"], 0 if a["method"] == "full" else a["budget"]
        answers[key][0] += a["correct"]
        answers[key][1] += a["cases"]
    return cells, answers


def processor():
    """The name of this machine's processor."""
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
