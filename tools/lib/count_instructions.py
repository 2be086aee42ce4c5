"""Runs a program under callgrind and writes how many instructions each of its kernels took, or compares them with a file.

Counts do not depend on what else the machine does, but they do on the compiler; so the file names it, and counts of another one
are not compared: the exit status is then 77.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

TOLERANCE = 0.02  # what may change without a word: the C library's part, alignment


def first_line(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def counts(program):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out", program], check=True,
                       stderr=subprocess.DEVNULL)
        found = {}
        for path in sorted(pathlib.Path(folder).iterdir(), key=lambda p: int(p.suffix[1:]) if p.suffix[1:].isdigit() else 0):
            text = path.read_text(encoding="utf-8", errors="replace")
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
            total = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
            if name and total:
                found[name[1]] = int(total[1])
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help=f"fail when a count has moved by more than {TOLERANCE:.0%}")
    args = parser.parse_args()
    cache = next(p / "CMakeCache.txt" for p in args.program.resolve().parents if (p / "CMakeCache.txt").exists()).read_text(encoding="utf-8")
    entry = lambda key: (re.search(rf"^{key}:\w+=(.*)$", cache, re.MULTILINE) or ["", ""])[1]
    made_with = {"compiler": first_line(entry("CMAKE_CXX_COMPILER"), "--version"), "flags": f"{entry('CMAKE_CXX_FLAGS_RELEASE')} -march={entry('KVFOLD_MARCH')}"}
    before = json.loads(args.file.read_text(encoding="utf-8")) if args.file.exists() else {}
    if args.check and before.get("made_with") != made_with:
        print(f"{args.file} is of {before.get('made_with')}, this is {made_with}: not compared")
        sys.exit(77)
    now = counts(args.program)
    if not now:
        sys.exit("callgrind has counted nothing")
    old = before.get("instructions", {})
    moved = []
    for name, count in now.items():
        change = count / old[name] - 1 if name in old else None
        print(f"{name:28} {count:>14,}  " + (f"{change:+.2%}" if change is not None else "new"))
        if change is None or abs(change) > TOLERANCE:
            moved.append(name)
    moved += sorted(set(old) - set(now))
    if args.check:
        if moved:
            sys.exit(f"moved by more than {TOLERANCE:.0%}: {', '.join(moved)}; if that is meant, run tools/bench --instructions")
        return
    args.file.write_text(json.dumps({"made_with": made_with, "instructions": now}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
