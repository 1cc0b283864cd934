"""The same work by qlog, by plain PyTorch and by transformers, each in a process of its own.

    launch/install parity
    python -m qlog.benchmark.compare --out=compare.json --markdown=compare.md

Random weights of the Qwen3 architecture, the same for all; float32; full-length rollouts. PyTorch's
training step is the usual one: M separate sequences, logits of the completion only, clip, AdamW.
qlog runs in two processes: the first compiles, the second finds the programs in the cache and is
timed. Ratios count: run it on a quiet machine. Other shapes: --only=train:tiny:2x16:1024+64, which
is kind:size:prompts x M:prompt tokens + new tokens.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from qlog.console import markdown_table, show_markdown, versions
from qlog.storage import strict_json

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
_ANSWER_TOKENS = 16  # of the gold answer in `score`
_PART = 4  # rollouts that both train on at a time, where all at once would not fit


class Work(NamedTuple):
    """One line of the table: what every implementation does."""

    kind: str  # train, rollouts or score
    size: str  # of the model, a key of SIZES
    prompts: int  # B
    rollouts: int  # M of each prompt
    prompt_tokens: int  # P
    new_tokens: int  # of each rollout

    @property
    def is_in_parts(self) -> bool:
        """Whether both train on a few rollouts at a time, since PyTorch's memory asks for it."""
        return self.size == "small" and self.prompt_tokens >= 1024


def parse(text: str) -> Work:
    """The work of a text such as train:tiny:2x16:1024+64."""
    kind, size, shape, lengths = text.split(":")
    prompts, rollouts = map(int, shape.split("x"))
    prompt_tokens, new_tokens = map(int, lengths.split("+"))
    return Work(kind, size, prompts, rollouts, prompt_tokens, new_tokens)


# ---- qlog ----


def run_qlog(work: Work, weights: str, repeats: int, remat: str = "") -> dict[str, Any]:
    """Times qlog.

    Args:
      weights: folder that `write_weights` wrote.
      repeats: of the work; their median counts.
      remat: of training; '' is dots where both train in parts, else none.

    Returns:
      Seconds as `measure.Times` names them, tokens, needed_flops, versions, and by kind: grad_norm,
      peak_memory and parts (train), fresh_median (score).
    """
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
    remat = remat or ("dots" if work.is_in_parts else "none")
    policy = Policy(config, config.vocab_size, remat=remat)
    if work.kind == "train":
        size = phases.Size(work.prompts, work.rollouts, work.prompt_tokens, work.new_tokens - 1, 1)
        batch = phases.make_batch(policy, size)
        # A group at a time, or less.
        microbatch = Microbatch(1, _PART if work.is_in_parts else size.rollouts)
        trainer = phases.Trainer(params, policy, size, batch, microbatch)
        phase = trainer.phase()
        del params  # the trainer owns and donates them
        times = measure.repeat(phase.call, repeats)
        found = {"grad_norm": trainer.norms[0], "peak_memory": measure.process_peak_memory()}
        found["parts"] = trainer.breakdown(times.median, repeats)
    else:
        answer = _ANSWER_TOKENS if work.kind == "score" else 1
        size = phases.Size(work.prompts, work.rollouts, work.prompt_tokens, work.new_tokens, answer)
        timed = phases.rollout_phases(params, policy, size, phases.make_batch(policy, size))
        phase = timed[work.kind]
        times = measure.repeat(phase.call, repeats)
        found = {}
        if work.kind == "score":
            found["fresh_median"] = measure.repeat(timed["score_fresh"].call, repeats).median
    return {
        **times._asdict(),
        **found,
        "tokens": phase.tokens,
        "needed_flops": phase.need.flops,
        "versions": f"jax {jax.__version__}",
    }


def write_weights(size: str, folder: pathlib.Path) -> None:
    """Writes random weights of a model of SIZES in Hugging Face's format."""
    import jax

    from qlog import models

    config = models.DecoderConfig(**SIZES[size])
    models.huggingface.export(
        models.init(config, jax.random.key(0)), config, folder, dtype="float32"
    )


# ---- Its peers ----


def run_torch(work: Work, weights: str, repeats: int) -> dict[str, Any]:
    """Times transformers' `generate` (rollouts), or plain PyTorch on a transformers model.

    Returns:
      Seconds as `measure.Times` names them, versions, and grad_norm of training.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    run = {"rollouts": _torch_rollouts, "score": _torch_score, "train": _torch_train}[work.kind]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {**run(work, weights, model, repeats), "versions": versions}


def _torch_batch(work: Work, weights: str, rationale: int, answer: int) -> tuple[Any, Any, Any]:
    """qlog's batch as tensors: prompts [B, P], completions [B * M, N] and advantages [B, M]."""
    import numpy as np
    import torch

    from qlog import models
    from qlog.benchmark import work as phases
    from qlog.policy import Policy

    config = models.huggingface.read_config(weights)
    size = phases.Size(work.prompts, work.rollouts, work.prompt_tokens, rationale, answer)
    batch = phases.make_batch(Policy(config, config.vocab_size), size)
    as_tensor = lambda x: torch.from_numpy(np.array(x)).long()
    completions = as_tensor(batch.trajectories.tokens).flatten(0, 1)
    return as_tensor(batch.prompts.tokens), completions, torch.from_numpy(batch.advantages)


def _torch_rollouts(work: Work, weights: str, model: Any, repeats: int) -> dict[str, Any]:
    import torch

    from qlog.benchmark import measure

    prompts, _, _ = _torch_batch(work, weights, work.new_tokens - 1, 1)
    model.eval()
    model.generation_config.eos_token_id = None  # every rollout has the full length

    def generate():
        with torch.inference_mode():
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=work.rollouts,
                max_new_tokens=work.new_tokens,
                pad_token_id=0,
                cache_implementation="static",
            )
        return tokens.shape

    return measure.repeat(generate, repeats)._asdict()


def _torch_score(work: Work, weights: str, model: Any, repeats: int) -> dict[str, Any]:
    """The usual way: without caches, the prompt and the rationale pass through the model again."""
    import torch

    from qlog.benchmark import measure

    prompts, completions, _ = _torch_batch(work, weights, work.new_tokens, _ANSWER_TOKENS)
    tokens = torch.cat([prompts.repeat_interleave(work.rollouts, 0), completions], 1)
    answers = completions[:, -_ANSWER_TOKENS:, None]
    model.config.use_cache = False
    model.eval()

    def score():
        with torch.inference_mode():
            logits = model(tokens, logits_to_keep=_ANSWER_TOKENS + 1).logits[:, :-1]
            return float(logits.log_softmax(-1).gather(-1, answers).sum())

    return measure.repeat(score, repeats)._asdict()


def _torch_train(work: Work, weights: str, model: Any, repeats: int) -> dict[str, Any]:
    import torch

    from qlog.benchmark import measure

    prompts, completions, advantages = _torch_batch(work, weights, work.new_tokens - 1, 1)
    prompts = prompts.repeat_interleave(work.rollouts, 0)  # [B * M, P]
    advantages = advantages.reshape(-1, 1)
    sequences = len(completions)
    size = _PART if work.is_in_parts else sequences
    model.config.use_cache = False  # no caches of keys and values while training
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    norms = []

    def step():
        optimizer.zero_grad(set_to_none=True)
        for first in range(0, sequences, size):
            part = slice(first, first + size)
            tokens = torch.cat([prompts[part], completions[part]], 1)
            # Logits of the completion only, which begins one position before its first token.
            logits = model(tokens, logits_to_keep=work.new_tokens + 1).logits[:, :-1]
            picked = logits.gather(-1, completions[part][..., None]).squeeze(-1)
            log_probs = picked - torch.logsumexp(logits, -1)
            # The mean over a rollout's tokens, then over the rollouts of the whole batch.
            (-(advantages[part] * log_probs).mean(1).sum() / sequences).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        return norms[-1]

    times = measure.repeat(step, repeats)
    return {**times._asdict(), "grad_norm": norms[0]}


# ---- The table ----


def main() -> None:
    args = _arguments()
    if args.worker:
        row = work_alone(args.worker, args.weights, args.repeats, args.remat)
        print(json.dumps(row), flush=True)
        return
    peak = json.loads(_python("-c", _PEAK))
    rows = {}
    works = {text: parse(text) for text in args.only.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        # The same weights for all, in files of the format that all of them read.
        for size in {work.size for work in works.values()}:
            write_weights(size, pathlib.Path(folder) / size)
        for text, work in works.items():
            rows[text] = _compare(text, f"{folder}/{work.size}", f"{folder}/cache/{text}", args)
            print(line(text, rows[text], peak), flush=True)
    versions = {row["versions"] for pair in rows.values() for row in pair.values()}
    about = f"{machine()}, {', '.join(sorted(versions))}; matmul peak {peak / 1e9:.0f} GFLOP/s"
    table = markdown_table([_cells(text, row, peak) for text, row in rows.items()])
    if any("parts" in row["qlog"] for row in rows.values()):
        table += "\n\n" + breakdown(rows)
    if args.out:
        facts = {"about": about, "matmul_peak_flops": peak, "repeats": args.repeats, "rows": rows}
        text = strict_json.dumps(facts, indent=2) + "\n"
        pathlib.Path(args.out).write_text(text, encoding="utf-8")
    if args.markdown:
        pathlib.Path(args.markdown).write_text(table + "\n", encoding="utf-8")
    print()
    show_markdown(f"{about}\n\n{table}")


def _arguments() -> argparse.Namespace:
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
    parser.add_argument("--version", action="version", version=versions())
    # Of the processes that this one starts.
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(text: str, weights: str, cache: str, args: argparse.Namespace) -> dict[str, Any]:
    """One line's numbers, {"torch": ..., "qlog": ...}, each from processes of its own."""
    torch = _run("torch", text, weights, args.repeats, args.remat, cache)
    # The cache is empty at first. The process that compiles takes memory for it and is not timed.
    compiling = _run("qlog", text, weights, 1, args.remat, cache)
    qlog = _run("qlog", text, weights, args.repeats, args.remat, cache)
    qlog["first"] = compiling["first"]
    qlog["peak_memory_compiling"] = compiling["peak_memory"]
    return {"torch": torch, "qlog": qlog}


def work_alone(worker: str, weights: str, repeats: int, remat: str = "") -> dict[str, Any]:
    """One implementation's work in this process, with the memory that the process took.

    Args:
      worker: qlog/WORK or torch/WORK.
      weights, repeats, remat: as `run_qlog` takes them.
    """
    from qlog.benchmark import measure
    from qlog.parallel import process

    process.set_up()
    implementation, _, text = worker.partition("/")
    if implementation == "qlog":
        row = run_qlog(parse(text), weights, repeats, remat)
    else:
        row = run_torch(parse(text), weights, repeats)
    return {"peak_memory": measure.process_peak_memory()} | row


# The program that measures the machine, in a process without memory of its own to speak of.
_PEAK = """
import json
import jax.numpy as jnp
from qlog.benchmark.measure import measure_peaks
print(json.dumps(measure_peaks(jnp.float32).flops))
"""


def line(text: str, row: Mapping[str, Any], peak: float) -> str:
    """One line of the Markdown table, without the header."""
    return markdown_table([_cells(text, row, peak)]).splitlines()[-1]


def _cells(text: str, row: Mapping[str, Any], peak: float) -> dict[str, str]:
    """A row of the table; `peak` is the machine's FLOP/s of matrix products."""
    work, torch, qlog = parse(text), row["torch"], row["qlog"]
    kind = work.kind
    if kind == "score":
        kind = f"score {_ANSWER_TOKENS} answer tokens (PyTorch: all again)"
    lengths = f"{work.prompt_tokens} + {work.new_tokens}"
    memory = (torch["peak_memory"], qlog["peak_memory"], qlog["peak_memory_compiling"])
    return {
        "work": kind,
        "shape": f"{work.size} {work.prompts}x{work.rollouts}, {lengths}",
        "PyTorch s (min - max)": _spread(torch),
        "qlog s (min - max)": _spread(qlog),
        "faster": f"{torch['median'] / qlog['median']:.1f}x",
        "MB: PyTorch, qlog, qlog compiling": ", ".join(f"{x / 2**20:,.0f}" for x in memory),
        "qlog's needed FLOPs of peak": f"{qlog['needed_flops'] / qlog['median'] / peak:.2f}",
    }


def _spread(row: Mapping[str, Any]) -> str:
    return f"{row['median']:.2f} ({row['shortest']:.2f} - {row['longest']:.2f})"


def breakdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of where the time of qlog's training steps goes."""
    table = []
    for text, row in rows.items():
        qlog = row["qlog"]
        shares = {
            name: f"{seconds:.2f} s, {seconds / qlog['median']:.0%}"
            for name, seconds in qlog.get("parts", {}).items()
        }
        if shares:
            table.append({"training step": text.removeprefix("train:"), **shares})
    return markdown_table(table)


def machine() -> str:
    """The processor, its cores and the Python."""
    name = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        found = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _run(
    implementation: str, text: str, weights: str, repeats: int, remat: str, cache: str
) -> dict[str, Any]:
    """The numbers of `work_alone` in a process of its own; `cache` keeps compiled programs."""
    out = _python(
        "-m",
        "qlog.benchmark.compare",
        f"--worker={implementation}/{text}",
        f"--weights={weights}",
        f"--repeats={repeats}",
        *[f"--remat={remat}"] * bool(remat),
        JAX_COMPILATION_CACHE_DIR=cache,
    )
    return json.loads(out.splitlines()[-1])


def _python(*arguments: str, **environment: str) -> str:
    """What another Python prints; ends this process where the other one fails."""
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
