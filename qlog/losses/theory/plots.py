"""Draws the theory of the family: `python -m qlog.losses.theory.plots --out=DIR`.

Five figures, PNG: how much an example counts in each member of the family, escape time against p0,
escort distributions, contamination by noise against time, and the bias of GARL against M, each from
the functions of `closed_forms` and `exact`.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qlog.losses import aliases
from qlog.losses.theory import closed_forms, exact

try:
    from matplotlib import pyplot
    from matplotlib.axes import Axes
except ModuleNotFoundError:  # the losses need JAX and optax only, their plots this as well
    _SENTENCE = "the plots need the package matplotlib: run pip install matplotlib."
    if __name__ != "__main__":  # who imports, a notebook for example, must not be ended
        raise ImportError(_SENTENCE, name="matplotlib") from None
    print(f"qlog: {_SENTENCE}", file=sys.stderr)
    sys.exit(2)

pyplot.switch_backend("Agg")  # files only: needs no display

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
COLOURS = pyplot.colormaps["viridis"](np.linspace(0, 0.9, len(QS)))


def family(axes: Axes) -> None:
    """How much an example counts: the factor of each member on grad P, against P.

    Of objectives f(P) it is f'(P), whatever the estimator; GRPO has no objective of that form, but
    its standard deviation is such a factor. (The bounds `jensen`, `log_prob` and `tempered` depend
    on more than P.)
    """
    p = np.geomspace(1e-4, 0.999, 200)
    for q, colour in zip(QS, COLOURS, strict=True):
        label = {0.0: "q = 0: rb_rloo, rloo", 1.0: "q = 1: iwae, trice, maxrl"}.get(q)
        axes.loglog(p, p**-q, color=colour, label=label or f"q = {q}: garl, paft")
    for order, style in ((4, "--"), (32, ":")):
        weight = sum((1 - p) ** j for j in range(order))
        axes.loglog(p, weight, style, color="black", label=f"rb_maxrl, T = {order}")
    for k, style in ((4, "--"), (32, ":")):
        weight = k * (1 - p) ** (k - 1)
        axes.loglog(p, weight, style, color="tab:orange", label=f"rb_pass_at_k, pkpo: k = {k}")
    axes.loglog(p, 1 / np.sqrt(p * (1 - p)), "-.", color="tab:red", label="grpo: 1 / std")
    axes.set(xlabel="success probability P", ylabel="factor on grad P", ylim=(0.03, 3e4))
    axes.set_title("The family: how much an example of probability P counts")
    axes.legend(fontsize=7)


def escape_time(axes: Axes) -> None:
    """Time to reach p = 1/2 on the sigmoid model (eq 15), and its order (Theorems 5.1, 5.2)."""
    log_p0 = np.linspace(np.log(1e-8), np.log(0.1), 60)
    for q, colour in zip(QS, COLOURS, strict=True):
        exact_time = closed_forms.sigmoid_escape_time(log_p0, np.log(0.5), q)
        axes.loglog(np.exp(log_p0), exact_time, color=colour, label=f"q = {q}")
        axes.loglog(np.exp(log_p0), closed_forms.escape_time_order(log_p0, q), ":", color=colour)
    axes.set(xlabel="first success probability p0", ylabel="time to reach p = 0.5")
    axes.set_title("Escape time: exact (lines), order (dots)")
    axes.legend()


def escorts(axes: Axes) -> None:
    """The distribution that minimises J_Q over labels of frequencies alpha (Theorem 3.1)."""
    alpha = np.array([0.35, 0.25, 0.2, 0.12, 0.08])
    place = np.arange(len(alpha))
    for i, (q, colour) in enumerate(zip(QS, COLOURS, strict=True)):
        theta = closed_forms.escort(np.log(alpha), q)
        axes.bar(place + 0.16 * (i - 2), theta, 0.16, color=colour, label=f"q = {q}")
    axes.set(xlabel="label", ylabel="probability at the minimum")
    axes.set_xticks(place, [f"alpha = {a}" for a in alpha], fontsize=7)
    axes.set_title("Escort distributions: alpha itself at q = 1, its mode at q = 0")
    axes.legend()


def contamination(axes: Axes) -> None:
    """Probability of a wrong label against time, 20% of labels wrong (Prop C.2)."""
    noise, start = 0.2, 1e-6
    for q, colour in zip(QS[1:], COLOURS[1:], strict=True):
        times, etas = closed_forms.noise_flow(noise, q, start, 3000)
        # The flow begins at `start`: add the time from 0 to it.
        times = times + closed_forms.noise_fitting_time(start, noise, q)
        axes.loglog(times, etas, color=colour, label=f"q = {q}")
        early = etas < 0.1 * closed_forms.noise_equilibrium(noise, q)
        order = closed_forms.noise_fitting_time(etas[early], noise, q)
        axes.loglog(order, etas[early], ":", color=colour)
    axes.set(xlabel="time", ylabel="probability of the wrong label")
    axes.set_title("Noise fitting: flow (lines), order (dots); never at q = 0")
    axes.legend()


def bias(axes: Axes) -> None:
    """Relative bias of plug-in GARL, exact, and to first order in 1/M (Theorem 6.1)."""
    model = exact.LatentModel(jnp.array([0.0, 1.0, -0.5]), jnp.array([-3.0, -1.0, 1.0]))
    rollouts = np.array([2, 8, 32])  # the exact bias: every M compiles anew
    for q, colour in zip(QS[1:], COLOURS[1:], strict=True):
        gradient = exact.exact_gradient(model, q)
        size = np.linalg.norm(gradient)
        means = [exact.moments(model, aliases.garl(q), m).mean for m in rollouts.tolist()]
        found = [np.linalg.norm(mean - gradient) / size for mean in means]
        first_order = np.linalg.norm(exact.leading_bias(model, q, 1)) / size / rollouts
        axes.loglog(rollouts, found, "o-", color=colour, label=f"q = {q}")
        axes.loglog(rollouts, first_order, ":", color=colour)
    axes.set_xticks(rollouts, rollouts)
    axes.minorticks_off()
    axes.set(xlabel="rollouts M", ylabel="|bias| / |gradient|")
    axes.set_title("Bias of GARL at P = 0.28: exact (lines), Theorem 6.1 (dots)")
    axes.legend()


FIGURES: dict[str, Callable[[Axes], None]] = {
    "family": family,
    "escape_time": escape_time,
    "escort": escorts,
    "noise_fitting": contamination,
    "bias": bias,
}


def save_figures(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes the five figures into `folder`, which is created; returns their paths."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in FIGURES.items():
        figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
        plot(axes)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        pyplot.close(figure)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """The command: draws into --out and prints the files' paths."""
    parser = argparse.ArgumentParser(description="Draws the theory of the family of losses.")
    parser.add_argument("--out", required=True, help="folder for the figures")
    for path in save_figures(parser.parse_args(argv).out):
        print(path)


if __name__ == "__main__":
    # Numbers of a few points: no accelerator is looked for, unless the environment names one.
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
    main()
