"""Trains, evaluates and exports the tiny byte-level model. Run it through tools/train_tiny_model."""

import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import tiny_model_net as net_lib
import tiny_model_tasks as tasks

TEMPLATES = Path(__file__).resolve().parents[2] / "data" / "tasks" / "templates.json"
CHECK_EVERY = 250_000  # bytes of training between two checks on fresh tasks and held-out text
HELD_OUT = ("frankenstein.txt", "dracula.txt")


# ---- optimizer -------------------------------------------------------------------------------------------------------


def orthogonalise(g):
    """Newton-Schulz iteration (quintic) towards the nearest semi-orthogonal matrix; `g` is [N, rows, columns]."""
    x = g.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.transpose(1, 2)
    x = x / (x.float().flatten(1).norm(dim=1)[:, None, None] + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x if wide else x.transpose(1, 2)).float()


class Optimizer:
    """Muon for the matrices, Adam for the embedding and the gains. Learning rates are those of scale 1."""

    def __init__(self, weights, matrix_lr, other_lr, weight_decay):
        self.weights, self.matrix_lr, self.other_lr, self.weight_decay = weights, matrix_lr, other_lr, weight_decay
        self.groups = {}
        for name, w in weights.items():
            if w.ndim == 2 and name != "embed_tokens":
                self.groups.setdefault(tuple(w.shape), []).append(name)
        self.others = [n for n, w in weights.items() if w.ndim == 1 or n == "embed_tokens"]
        self.state = {f"m.{n}": torch.zeros_like(w) for n, w in weights.items()}
        self.state |= {f"v.{n}": torch.zeros_like(weights[n]) for n in self.others}
        self.count = 0

    @torch.no_grad()
    def step(self, scale):
        self.count += 1
        norm = math.sqrt(sum(float(w.grad.square().sum()) for w in self.weights.values()))
        if not math.isfinite(norm):
            for w in self.weights.values():
                w.grad = None
            return norm
        for shape, names in self.groups.items():
            updates = []
            for name in names:
                m, g = self.state[f"m.{name}"], self.weights[name].grad
                m.lerp_(g, 0.05)
                updates.append(g.lerp(m, 0.95))
            updates = orthogonalise(torch.stack(updates))
            lr = self.matrix_lr * scale
            factor = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            for name, update in zip(names, updates):
                w = self.weights[name]
                w.mul_(1 - lr * self.weight_decay).add_(update, alpha=-factor)
        clip = min(1.0, 1.0 / (norm + 1e-9))
        for name in self.others:
            m, v, g = self.state[f"m.{name}"], self.state[f"v.{name}"], self.weights[name].grad * clip
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.05)
            update = (m / (1 - 0.9**self.count)) / ((v / (1 - 0.95**self.count)).sqrt() + 1e-8)
            self.weights[name].add_(update, alpha=-self.other_lr * scale)
        for w in self.weights.values():
            w.grad = None
        return norm


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(directory, shape, weights, optimizer, progress):
    """Writes to a temporary name first, so that an interruption leaves the previous checkpoint whole."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "shape": asdict(shape),
        "weights": {n: w.detach() for n, w in weights.items()},
        "optimizer": optimizer.state,
        "optimizer_count": optimizer.count,
        "progress": progress,
    }
    temporary = directory / "checkpoint.pt.new"
    torch.save(content, temporary)
    os.replace(temporary, directory / "checkpoint.pt")


def load_checkpoint(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(net, data, context, stride, batch=2, limit=None):
    """Every byte is scored once, with at least `context - stride` bytes before it (but for the first window)."""
    tokens = torch.from_numpy(data.astype(np.int64))
    starts = list(range(0, len(tokens) - context, stride))
    if limit:
        starts = starts[:: max(1, len(starts) // limit)][:limit]
    total, count = 0.0, 0
    for at in range(0, len(starts), batch):
        rows = torch.stack([tokens[s : s + context + 1] for s in starts[at : at + batch]])
        losses, _ = net.losses(rows[:, :-1], rows[:, 1:])
        for row, start in enumerate(starts[at : at + batch]):
            scored = losses[row] if start == 0 and not limit else losses[row, context - stride :]
            total += float(scored.double().sum())
            count += len(scored)
    return total / count / math.log(2), count


@torch.no_grad()
def retrieval_accuracy(net, templates, books, seed, context, depths, cases, batch=4):
    """{task: [share of exact answers per depth]}.

    An answer is exact if every byte of it is the most likely one given the bytes before it, which is the same as
    greedy generation from the prompt producing the answer.
    """
    result = {}
    for task_index, task in enumerate(tasks.TASKS):
        result[task] = []
        for depth_index, depth in enumerate(depths):
            rng = np.random.default_rng([seed, task_index, depth_index])
            made = [tasks.evaluation_case(templates, books, rng, context, task, depth) for _ in range(cases)]
            good = 0
            for at in range(0, cases, batch):
                part = made[at : at + batch]
                rows = torch.zeros(len(part), context, dtype=torch.long)
                for row, (data, _) in enumerate(part):
                    rows[row, : len(data)] = torch.from_numpy(data.astype(np.int64))
                _, best = net.losses(rows[:, :-1], rows[:, 1:])
                for row, (_, answer) in enumerate(part):
                    good += bool((best[row, answer.start - 1 : answer.stop - 1] == rows[row, answer]).all())
            result[task].append(good / cases)
    return result


# ---- training --------------------------------------------------------------------------------------------------------


def parse_stages(text):
    """`length:batch:steps,...`; the last stage may leave out steps and then never ends."""
    stages = []
    for part in text.split(","):
        numbers = [int(n) for n in part.split(":")]
        stages.append((numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else None))
    return stages


def stage_of(stages, step):
    for length, batch, steps in stages:
        if steps is None or step < steps:
            return length, batch
        step -= steps
    return stages[-1][:2]


def train(args):
    torch.set_num_threads(args.threads)
    books_dir = Path(args.books)
    train_files = [p for p in sorted(books_dir.glob("*.txt")) if p.name not in HELD_OUT]
    held_files = [books_dir / name for name in HELD_OUT if (books_dir / name).exists()]
    books, templates = tasks.Books(train_files), tasks.Templates(TEMPLATES)
    held_out = tasks.Books(held_files)
    directory = Path(args.checkpoint)
    stages = parse_stages(args.stages)

    shape = net_lib.Shape(hidden=args.hidden, layers=args.layers, ffn=args.ffn)
    progress = {"step": 0, "bytes": 0, "seconds": 0.0, "history": []}
    saved = None
    if args.resume and (directory / "checkpoint.pt").exists():
        saved = load_checkpoint(directory)
        shape, weights, progress = net_lib.Shape(**saved["shape"]), saved["weights"], saved["progress"]
    elif (directory / "checkpoint.pt").exists() and not args.resume:
        sys.exit(f"{directory} holds a checkpoint: pass --resume to go on from it, or another directory")
    else:
        weights = net_lib.init_weights(shape, args.seed)
    for w in weights.values():
        w.requires_grad_()
    optimizer = Optimizer(weights, args.matrix_lr, args.other_lr, args.weight_decay)
    if saved:
        optimizer.state, optimizer.count = saved["optimizer"], saved["optimizer_count"]
    net = net_lib.Net(shape, weights, torch.bfloat16 if args.dtype == "bf16" else torch.float32)

    print(f"model: {shape}, {net_lib.parameters(weights)} parameters")
    print(f"data: {', '.join(p.name for p in train_files)}: {books.total} bytes; held out: {', '.join(p.name for p in held_files)}")
    print(f"seed {args.seed}, stages {args.stages}, mix {args.mix}, lr {args.matrix_lr}/{args.other_lr}, from step {progress['step']}", flush=True)

    stop = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.append(True))
    mix = tuple(float(x) for x in args.mix.split(","))
    begin = last_report = last_save = time.monotonic()
    checked = -CHECK_EVERY
    window = {"text": 0.0, "text_w": 0.0, "task": 0.0, "task_w": 0.0, "bytes": 0}
    while True:
        now = time.monotonic()
        left = math.inf
        scale = min(1.0, (progress["step"] + 1) / args.warmup_steps)
        if args.minutes:
            left = begin + 60 * args.minutes - now
            if args.decay_minutes and left < 60 * args.decay_minutes:
                scale *= max(0.0, left / (60 * args.decay_minutes))
        if args.steps:
            steps_left = args.steps - progress["step"]
            if args.decay_steps and steps_left < args.decay_steps:
                scale *= max(0.0, steps_left / args.decay_steps)
            left = min(left, steps_left)
        if left <= 0 or stop:
            break

        length, batch = stage_of(stages, progress["step"])
        rng = np.random.default_rng([args.seed, 1, progress["step"]])
        data, loss_weights = tasks.training_batch(templates, books, rng, batch, length, mix)
        tokens = torch.from_numpy(data.astype(np.int64))
        loss_weights = torch.from_numpy(loss_weights)
        losses, _ = net.losses(tokens[:, :-1], tokens[:, 1:])
        ((losses * loss_weights).sum() / losses.numel()).backward()
        norm = optimizer.step(scale)

        progress["step"] += 1
        progress["bytes"] += losses.numel()
        values = losses.detach()
        for key, chosen in (("text", loss_weights == tasks.TEXT_WEIGHT), ("task", loss_weights == tasks.FIRST_BYTE_WEIGHT)):
            window[key] += float(values[chosen].sum())
            window[key + "_w"] += float(chosen.sum())
        window["bytes"] += losses.numel()

        now = time.monotonic()
        if now - last_report >= args.report_seconds:
            line = {
                "step": progress["step"], "length": length, "scale": round(scale, 3),
                "text_bpb": window["text"] / max(1, window["text_w"]) / math.log(2),
                "first_byte_bits": window["task"] / max(1, window["task_w"]) / math.log(2),
                "norm": norm, "bytes_per_s": window["bytes"] / (now - last_report),
                "bytes": progress["bytes"], "seconds": progress["seconds"] + now - begin,
            }
            if progress["bytes"] - checked >= CHECK_EVERY:
                line |= quick_check(net, templates, held_out, length, progress["step"])
                checked = progress["bytes"]
            progress["history"].append({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
            print(report(line), flush=True)
            window = dict.fromkeys(window, 0)
            last_report = time.monotonic()
        if now - last_save >= 60 * args.save_minutes:
            save(args, directory, shape, weights, optimizer, progress, begin)
            last_save = time.monotonic()
    save(args, directory, shape, weights, optimizer, progress, begin)
    if stop:
        sys.exit(f"interrupted; --resume goes on from step {progress['step']}")
    net_lib.export(weights, shape, args.out)
    print(f"done: {progress['step']} steps, {progress['bytes']} bytes, {progress['seconds'] + time.monotonic() - begin:.0f} s; wrote {args.out}")


def save(args, directory, shape, weights, optimizer, progress, begin):
    seconds = progress["seconds"] + time.monotonic() - begin
    save_checkpoint(directory, shape, weights, optimizer, progress | {"seconds": seconds})


@torch.no_grad()
def quick_check(net, templates, held_out, length, step):
    """A small fresh batch: share of exact answers per task, and the loss on held-out text (second half of the context)."""
    rng = np.random.default_rng([step, 2])
    result = {}
    count = max(2, 2048 // length)
    for task in tasks.TASKS:
        rows = torch.zeros(count, length, dtype=torch.long)
        answers = []
        for row in range(count):
            data, answer = tasks.evaluation_case(templates, held_out, rng, length, task, rng.random())
            rows[row, : len(data)] = torch.from_numpy(data.astype(np.int64))
            answers.append(answer)
        _, best = net.losses(rows[:, :-1], rows[:, 1:])
        good = sum(bool((best[r, a.start - 1 : a.stop - 1] == rows[r, a]).all()) for r, a in enumerate(answers))
        result[task] = good / count
    rng = np.random.default_rng(3)
    tokens = torch.from_numpy(np.stack([held_out.crop(rng, length + 1) for _ in range(8192 // length)]).astype(np.int64))
    losses, _ = net.losses(tokens[:, :-1], tokens[:, 1:])
    result["held_out_bpb"] = float(losses[:, length // 2 :].mean()) / math.log(2)
    return result


def report(line):
    checks = ""
    if "held_out_bpb" in line:
        checks = f" | held-out {line['held_out_bpb']:.3f} " + " ".join(f"{task} {line[task]:.2f}" for task in tasks.TASKS)
    return (
        f"{line['seconds']:6.0f} s step {line['step']:6d} {line['bytes'] / 1e6:6.2f} MB len {line['length']:4d} lr {line['scale']:.2f} "
        f"{line['bytes_per_s'] / 1e3:5.1f} kB/s text {line['text_bpb']:.3f} 1st byte {line['first_byte_bits']:.3f}{checks}"
    )


def evaluate(args):
    torch.set_num_threads(args.threads)
    shape, weights = net_lib.load_exported(args.model)
    net = net_lib.Net(shape, weights, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    result = {"context": args.context, "stride": args.stride, "seed": args.seed, "cases": args.cases, "bits_per_byte": {}}
    for path in args.text:
        data = np.fromfile(path, np.uint8)
        bits, count = bits_per_byte(net, data, args.context, args.stride, limit=args.windows)
        result["bits_per_byte"][Path(path).name] = round(bits, 4)
        print(f"{Path(path).name}: {bits:.4f} bits per byte over {count} bytes (context {args.context}, stride {args.stride})", flush=True)
    if args.cases:
        depths = [float(d) for d in args.depths.split(",")]
        found = retrieval_accuracy(net, tasks.Templates(TEMPLATES), tasks.Books(args.text), args.seed, args.context, depths, args.cases)
        result["depths"], result["retrieval"] = depths, found
        print(f"exact answers, {args.cases} cases per cell, seed {args.seed}")
        print("  task       " + "".join(f"{d:7.2f}" for d in depths) + "    all")
        for task, shares in found.items():
            print(f"  {task:11s}" + "".join(f"{s:7.3f}" for s in shares) + f"{np.mean(shares):7.3f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def export(args):
    saved = load_checkpoint(Path(args.checkpoint))
    net_lib.export(saved["weights"], net_lib.Shape(**saved["shape"]), args.out)
    print(f"wrote {args.out} from step {saved['progress']['step']}")


def parse(argv):
    parser = argparse.ArgumentParser(prog="train_tiny_model", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the matrix products; weights are fp32")
    commands = parser.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train", help="train and export (the default command)")
    t.add_argument("--books", required=True, help="folder of .txt files; frankenstein.txt and dracula.txt are held out")
    t.add_argument("--out", required=True, help="folder for model.safetensors and config.json")
    t.add_argument("--checkpoint", default=os.environ.get("KVFOLD_TINY_CHECKPOINT"), help="folder for checkpoint.pt (default: in the cache folder)")
    t.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    t.add_argument("--minutes", type=float, help="stop after this long")
    t.add_argument("--steps", type=int, help="stop after this many steps in all")
    t.add_argument("--decay-minutes", type=float, default=0, help="let the learning rate fall to 0 over the last minutes")
    t.add_argument("--decay-steps", type=int, default=0)
    t.add_argument("--warmup-steps", type=int, default=60)
    t.add_argument("--seed", type=int, default=1)
    t.add_argument("--stages", default="256:16:1100,512:8:2400,2048:2", help="length:batch:steps,...; the last without steps")
    t.add_argument("--mix", default="0.5,0.15,0", help="share of task, of recall and of copy sequences; the rest is text")
    t.add_argument("--matrix-lr", type=float, default=0.015)
    t.add_argument("--other-lr", type=float, default=0.002)
    t.add_argument("--weight-decay", type=float, default=0.05)
    t.add_argument("--hidden", type=int, default=256)
    t.add_argument("--layers", type=int, default=4)
    t.add_argument("--ffn", type=int, default=768)
    t.add_argument("--report-seconds", type=float, default=20)
    t.add_argument("--save-minutes", type=float, default=4)
    e = commands.add_parser("evaluate", help="bits per byte and retrieval accuracy of an exported model")
    e.add_argument("--model", required=True, help="folder with model.safetensors and config.json")
    e.add_argument("--text", nargs="+", required=True, help="held-out text files; also the filler of the retrieval cases")
    e.add_argument("--context", type=int, default=2048)
    e.add_argument("--stride", type=int, default=512)
    e.add_argument("--windows", type=int, help="score only this many windows per file, evenly spread")
    e.add_argument("--cases", type=int, default=40, help="per task and depth; 0 leaves retrieval out")
    e.add_argument("--depths", default="0,0.25,0.5,0.75,1")
    e.add_argument("--seed", type=int, default=1000)
    e.add_argument("--json", help="also write the results here")
    x = commands.add_parser("export", help="write model.safetensors and config.json of a checkpoint")
    x.add_argument("--checkpoint", default=os.environ.get("KVFOLD_TINY_CHECKPOINT"))
    x.add_argument("--out", required=True)
    if argv and argv[0].startswith("--books"):
        argv = ["train", *argv]
    return parser.parse_args(argv)


def main():
    args = parse(sys.argv[1:])
    {"train": train, "evaluate": evaluate, "export": export}[args.command](args)


if __name__ == "__main__":
    main()
