"""The same work by qlog, by plain PyTorch and by transformers, each in a process of its own.

    launch/install parity
    python -m qlog.benchmark.compare --out=compare.json --markdown=compare.md

Random Qwen3-architecture weights, the same for all; float32; full-length rollouts. PyTorch's training
step is the usual one: M separate sequences, logits of the completion alone, clip, AdamW. qlog runs in
two processes: one compiles, the next, which finds that in the cache, is timed. Ratios count: run it on
a quiet machine. Other shapes: --only=train:tiny:2x16:1024+64 (kind:size:prompts x M:prompt + new).
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import NamedTuple

SIZES = {
    "tiny": {
        "num_layers": 4,
        "width": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "mlp_width": 768,
        "vocab_size": 4096,
    },
    "small": {
        "num_layers": 8,
        "width": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "mlp_width": 1536,
        "vocab_size": 32768,
    },
}
TABLE = (
    "train:tiny:4x8:256+128",
    "train:small:4x8:256+128",
    "train:tiny:2x16:1024+64",
    "train:small:1x16:1024+64",
    "rollouts:tiny:4x8:256+128",
    "rollouts:small:4x8:256+128",
    "rollouts:tiny:2x16:1024+64",
    "rollouts:small:1x16:1024+64",
    "score:tiny:2x16:1024+64",
    "score:small:4x8:256+128",
)
_ANSWER = 16  # tokens of the gold answer in `score`
PART = 4  # rollouts that both train on at a time, where all at once would not fit


class Work(NamedTuple):
    """kind: train | rollouts | score, of `size`: B prompts of P tokens, M rollouts of N tokens."""

    kind: str
    size: str
    prompts: int
    rollouts: int
    prompt: int
    new: int


def parse(text: str) -> Work:
    kind, size, shape, lengths = text.split(":")
    return Work(kind, size, *map(int, shape.split("x")), *map(int, lengths.split("+")))


def in_parts(work: Work) -> bool:
    """Whether both train on PART rollouts at a time, since PyTorch's memory asks for it."""
    return work.size == "small" and work.prompt >= 1024


# ---- qlog ----


def run_qlog(work: Work, weights: str, repeats: int, remat: str = "") -> dict:
    import jax
    import jax.numpy as jnp

    from qlog import models
    from qlog.benchmark import measure
    from qlog.benchmark import work as phases
    from qlog.learner.types import Microbatch
    from qlog.policy import Policy

    config = models.huggingface.read_config(weights)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda x: place, models.shapes(config))
    params = models.huggingface.load(weights, config, dtype=jnp.float32, shardings=places)
    policy = Policy(
        config, config.vocab_size, remat=remat or ("dots" if in_parts(work) else "none")
    )
    answer = _ANSWER if work.kind == "score" else 0
    size = phases.Size(work.prompts, work.rollouts, work.prompt, work.new, max(1, answer))
    if work.kind == "train":
        size = size._replace(rationale=work.new - 1)
        batch = phases.make_batch(policy, size)
        microbatch = Microbatch(
            1, PART if in_parts(work) else size.rollouts
        )  # a group at a time, or less
        trainer = phases.Trainer(params, policy, size, batch, microbatch)
        phase = trainer.phase()
        del params  # the trainer owns and donates them
        times = measure.repeat(phase.call, repeats)
        check = {"grad_norm": trainer.norms[0], "peak_memory": measure.process_peak_memory()}
        check["parts"] = trainer.breakdown(times.median, repeats)
    else:
        batch = phases.make_batch(policy, size)
        every = phases.rollout_phases(params, policy, size, batch)
        phase = every[work.kind]
        times = measure.repeat(phase.call, repeats)
        check = {}
        if work.kind == "score":
            fresh = measure.repeat(every["score_fresh"].call, repeats)
            check = {"fresh_median": fresh.median}
    return {
        **times._asdict(),
        **check,
        "tokens": phase.tokens,
        "needed_flops": phase.need.flops,
        "versions": f"jax {jax.__version__}",
    }


def write_weights(size: str, folder: pathlib.Path) -> None:
    import jax

    from qlog import models

    config = models.DecoderConfig(**SIZES[size])
    models.huggingface.export(
        models.init(config, jax.random.key(0)), config, folder, dtype="float32"
    )


# ---- Its peers ----


def run_torch(work: Work, weights: str, repeats: int) -> dict:
    import numpy as np
    import torch
    import transformers

    from qlog import models
    from qlog.benchmark import measure
    from qlog.benchmark import work as phases
    from qlog.policy import Policy

    transformers.logging.set_verbosity_error()
    config = models.huggingface.read_config(weights)
    size = phases.Size(work.prompts, work.rollouts, work.prompt, work.new - 1, 1)
    batch = phases.make_batch(Policy(config, config.vocab_size), size)
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    as_tensor = lambda x: torch.from_numpy(np.array(x)).long()
    prompts = as_tensor(batch.prompts.tokens)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if work.kind == "rollouts":
        model.eval()
        model.generation_config.eos_token_id = None

        def generate():
            with torch.inference_mode():
                return model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=work.rollouts,
                    max_new_tokens=work.new,
                    pad_token_id=0,
                    cache_implementation="static",
                )

        times = measure.repeat(lambda: generate().shape, repeats)
        return {**times._asdict(), "versions": versions}

    model.config.use_cache = False
    if work.kind == "score":
        size = size._replace(rationale=work.new, answer=_ANSWER)
        batch = phases.make_batch(Policy(config, config.vocab_size), size)
        completions = as_tensor(batch.trajectories.tokens).flatten(0, 1)
        tokens = torch.cat([prompts.repeat_interleave(work.rollouts, 0), completions], 1)
        answers = completions[:, -_ANSWER:, None]

        def score():
            with torch.inference_mode():
                logits = model.eval()(tokens, logits_to_keep=_ANSWER + 1).logits[:, :-1]
                return logits.log_softmax(-1).gather(-1, answers).sum()

        times = measure.repeat(lambda: float(score()), repeats)
        return {**times._asdict(), "versions": versions}

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    completions = as_tensor(batch.trajectories.tokens).reshape(-1, work.new)
    repeated = prompts.repeat_interleave(work.rollouts, 0)
    advantages = torch.from_numpy(batch.advantages).reshape(-1, 1)
    count = len(completions)
    part = PART if in_parts(work) else count
    norms = []

    def step():
        optimizer.zero_grad(set_to_none=True)
        for at in range(0, count, part):
            rows = slice(at, at + part)
            tokens = torch.cat([repeated[rows], completions[rows]], 1)
            logits = model(tokens, logits_to_keep=work.new + 1).logits[:, :-1]
            picked = logits.gather(-1, completions[rows][..., None]).squeeze(-1)
            log_probs = picked - torch.logsumexp(logits, -1)
            (-(advantages[rows] * log_probs).mean(1).sum() / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        return norms[-1]

    times = measure.repeat(step, repeats)
    return {**times._asdict(), "grad_norm": norms[0], "versions": versions}


# ---- The table ----


def main() -> None:
    from qlog.models import REMAT

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", default="", help="JSON file for all numbers")
    parser.add_argument("--markdown", default="", help="Markdown file for the table")
    parser.add_argument("--only", default=",".join(TABLE), help="work to run, comma-separated")
    parser.add_argument("--repeats", type=int, default=5, help="their median counts")
    parser.add_argument(
        "--remat",
        default="",
        choices=list(REMAT),
        help="qlog's, when it trains (default: dots where both train in parts, else none)",
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(
            json.dumps(work_alone(args.worker, args.weights, args.repeats, args.remat)), flush=True
        )
        return
    works = {text: parse(text) for text in args.only.split(",")}
    peak = json.loads(_python("-c", _PEAK))
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in {work.size for work in works.values()}:
            write_weights(size, pathlib.Path(folder) / size)
        for text, work in works.items():
            cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache/{text}"}  # empty at first
            run = functools.partial(
                _run, text=text, weights=f"{folder}/{work.size}", remat=args.remat, cache=cache
            )
            rows[text] = {"torch": run("torch", repeats=args.repeats)}
            compiling = run("qlog", repeats=1)
            rows[text]["qlog"] = run("qlog", repeats=args.repeats) | {
                "first": compiling["first"],
                "peak_memory_compiling": compiling["peak_memory"],
            }
            print(line(text, rows[text], peak), flush=True)
    versions = {row["versions"] for pair in rows.values() for row in pair.values()}
    about = f"{machine()}, {', '.join(sorted(versions))}; matmul peak {peak / 1e9:.0f} GFLOP/s"
    table = "\n".join([HEADER, *(line(text, row, peak) for text, row in rows.items())])
    if any("parts" in row["qlog"] for row in rows.values()):
        table += "\n\n" + breakdown(rows)
    if args.out:
        facts = {"about": about, "matmul_peak_flops": peak, "repeats": args.repeats, "rows": rows}
        pathlib.Path(args.out).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        pathlib.Path(args.markdown).write_text(table + "\n", encoding="utf-8")
    print(f"\n{about}\n\n{table}")


def work_alone(worker: str, weights: str, repeats: int, remat: str = "") -> dict:
    """One implementation's work in this process, with the memory that the process took."""
    from qlog.benchmark import measure
    from qlog.parallel import process

    process.set_up()
    implementation, _, text = worker.partition("/")
    if implementation == "qlog":
        row = run_qlog(parse(text), weights, repeats, remat)
    else:
        row = run_torch(parse(text), weights, repeats)
    return {"peak_memory": measure.process_peak_memory()} | row


_PEAK = (
    "from qlog.benchmark.measure import measure_peaks\nimport jax.numpy as jnp, json\n"
    "print(json.dumps(measure_peaks(jnp.float32).flops))"
)
HEADER = (
    "| work | shape | PyTorch s (min - max) | qlog s (min - max) | faster | MB: PyTorch, qlog, qlog compiling "
    "| qlog's needed FLOPs of peak |\n|---|---|---|---|---|---|---|"
)


def line(text: str, row: dict, peak: float) -> str:
    """One line of the Markdown table."""
    work, ours = parse(text), row["qlog"]
    shape = f"{work.size} {work.prompts}x{work.rollouts}, {work.prompt} + {work.new}"
    spread = lambda r: f"{r['median']:.2f} ({r['shortest']:.2f} - {r['longest']:.2f})"
    used = f"{ours['needed_flops'] / ours['median'] / peak:.2f}"
    memory = [
        f"{r[k] / 2**20:,.0f}"
        for r, k in (
            (row["torch"], "peak_memory"),
            (ours, "peak_memory"),
            (ours, "peak_memory_compiling"),
        )
    ]
    peer = row["torch"]
    kind = (
        work.kind if work.kind != "score" else f"score {_ANSWER} answer tokens (PyTorch: all again)"
    )
    return (
        f"| {kind} | {shape} | {spread(peer)} | {spread(ours)} "
        f"| {peer['median'] / ours['median']:.1f}x | {', '.join(memory)} | {used} |"
    )


def breakdown(rows: dict) -> str:
    """A Markdown table of where the time of qlog's training steps goes."""
    parts = {text: row["qlog"]["parts"] for text, row in rows.items() if "parts" in row["qlog"]}
    names = list(next(iter(parts.values())))
    lines = [f"| training step | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for text, seconds in parts.items():
        whole = rows[text]["qlog"]["median"]
        shares = (f"{seconds[name]:.2f} s, {seconds[name] / whole:.0%}" for name in names)
        lines.append(f"| {text.removeprefix('train:')} | {' | '.join(shares)} |")
    return "\n".join(lines)


def machine() -> str:
    name = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        found = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _run(name: str, text: str, weights: str, repeats: int, remat: str, cache: dict) -> dict:
    out = _python(
        "-m",
        "qlog.benchmark.compare",
        f"--worker={name}/{text}",
        f"--weights={weights}",
        f"--repeats={repeats}",
        *[f"--remat={remat}"] * bool(remat),
        **cache,
    )
    return json.loads(out.splitlines()[-1])


def _python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    if done.returncode:
        sys.exit(
            f"qlog.benchmark.compare: {' '.join(arguments)} failed with status {done.returncode}"
        )
    return done.stdout


if __name__ == "__main__":
    main()
