"""The paper's experiments as configs: what its Section 7 gives, and our choices where it is silent.

The files in configs/ differ only in the dataset and its budgets; everything else is here.
"""

from ml_collections import ConfigDict

from qlog.config.check import build_estimator
from qlog.config.schema import default, loss
from qlog.config.variants import Variant, estimator_variants, parse_variants

_ANNOTATED = 384  # tokens of the tiny variant's annotated rationales: FinQA's reach 324


def experiment(
    arg: str | None, *, dataset: str, total_budget: int, max_prompt_tokens: int, tensor: int = 1
) -> ConfigDict:
    """Qwen3 0.6B on one dataset, M = 32, cold start and GARL q = 0.75 unless `arg` says otherwise.

    Args:
      arg: variants, as in 'warm,grpo' or 'cold,garl,q=0.25,tiny'.
      dataset: finqa | hotpotqa | musique.
      total_budget: tokens of rationale and answer together (the paper's 4096, 3072, 2048).
      max_prompt_tokens: our choice: the longest prompt of the dataset fits.
      tensor: devices that share a prompt's heads: more than one where the caches of a prompt's M
        longest rollouts exceed 16 GiB.

    Raises:
      ConfigError: a variant that does not exist.
    """
    config = default()
    # ---- Given by the paper ----
    config.model = config.weights = "Qwen/Qwen3-0.6B"  # post-trained Qwen3 0.6B
    config.data.name = dataset  # the sizes of its splits: qlog/data/splits.py
    config.data.style = "cold"  # the paper has both starts: variants cold and warm
    config.rollout.rollouts_per_prompt = 32  # M
    config.rollout.rationale_budget = total_budget - 128
    config.rollout.answer_reserve = 128
    config.evaluation.rollouts_per_prompt = 16  # the best checkpoint is the one with the best m@16
    config.loss = loss("garl", q=0.75)  # with RLOO, divided by M^q
    # ---- Our choices ----
    _choose_data_and_rollouts(config, max_prompt_tokens)
    _choose_training(config)
    _choose_memory(config, tensor)
    _choose_evaluation(config)
    return parse_variants(arg, variants(), config)


# The paper does not give what the next four functions set. Nor does it give:
# - the texts of the prompts: ours are in qlog/data/tasks.py;
# - the other arguments of the losses: they keep the recipes' defaults. GRPO divides by the group's
#   standard deviation, as published. It has no KL term: the paper gives that no weight, and every
#   step is on policy;
# - fields that change only memory, speed or reports: they keep the defaults of config/schema.py.


def _choose_data_and_rollouts(config: ConfigDict, max_prompt_tokens: int) -> None:
    config.seed = 0  # of data order and sampling; the weights are given
    config.data.max_prompt_tokens = max_prompt_tokens  # fits the longest of our samples, warm
    config.data.overlong = "skip"  # the rare longer ones are counted, shown at start and left out
    config.rollout.temperature = 1.0  # the distribution that the gradient is about
    config.rollout.closing_text = ""  # only the thinking-end token is forced, as the paper words it


def _choose_training(config: ConfigDict) -> None:
    optimizer, train = config.optimizer, config.train
    # AdamW as usual for RL fine-tuning of models of this size:
    optimizer.learning_rate = 1e-6
    optimizer.warmup_steps = 10  # Adam's second moments are noise in the first steps
    optimizer.schedule = "constant"  # runs of different lengths stay comparable
    optimizer.b1, optimizer.b2, optimizer.eps = 0.9, 0.999, 1e-8  # Adam's own defaults
    optimizer.weight_decay = 0.0  # the policy starts from what it should not forget
    optimizer.max_grad_norm = 1.0  # q = 1 can blow a gradient up by 1/P
    train.steps = 500  # Figures 3 and 4 are decided by step 150
    train.prompts_per_step = 32  # with M = 32, 1024 rollouts per step; HotPotQA: 1.8 epochs
    train.updates_per_batch = 1  # on policy, as the estimators assume


def _choose_memory(config: ConfigDict, tensor: int) -> None:
    """These change only memory and speed. --mode=compile tells whether they fit."""
    config.dtype = "bfloat16"  # activations, as the weights were trained; parameters float32
    config.train.remat = "full"
    config.train.prompts_per_microbatch, config.train.rollouts_per_microbatch = 1, 8
    config.rollout.prompts_per_wave = 1  # 7 to 11 GiB of caches on each of a shard's chips
    config.evaluation.prompts_per_batch = 2  # of half the rollouts each
    # 16 GiB chips have no room for copies of the state, so fsdp takes all of a slice; each of
    # several slices has a copy. On more than 32 x tensor chips train.prompts_per_step has to grow
    # with them: the one flag that is needed.
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.mesh.tensor = tensor


def _choose_evaluation(config: ConfigDict) -> None:
    evaluation = config.evaluation
    evaluation.temperature = 1.0  # as in training; p@16 needs samples that differ
    evaluation.top_k, evaluation.top_p = 0, 1.0  # the whole distribution, as in training
    evaluation.prompts = 0  # the whole split, of which the paper gives the size
    evaluation.every = config.checkpoint.every = 50  # the spacing that Figure 4 shows
    evaluation.split, evaluation.final = "validation", "test"  # one chooses, the other reports


def variants() -> dict[str, Variant]:
    """cold | warm, the name of any estimator, q=..., tiny, model_card."""
    return estimator_variants() | {
        "sft": _sft,
        "cold": _cold,
        "warm": _warm,
        "tiny": tiny,
        "model_card": model_card,
    }


def _cold(config: ConfigDict, value: str) -> None:
    config.data.style = "cold"


def _warm(config: ConfigDict, value: str) -> None:
    config.data.style = "warm"


def _sft(config: ConfigDict, value: str) -> None:
    estimator_variants()["sft"](config, value)
    # After tiny, whose budget of sampled rationales is too short for the annotated ones:
    config.rollout.rationale_budget = max(_ANNOTATED, config.rollout.rationale_budget)


def model_card(config: ConfigDict, value: str = "") -> None:
    """Evaluation as Qwen3's model card advises for thinking; training stays at temperature 1."""
    config.evaluation.temperature, config.evaluation.top_k = 0.6, 20
    config.evaluation.top_p = 0.95


def tiny(config: ConfigDict, value: str = "") -> None:
    """A random model of the same kind and vocabulary, and budgets for two CPU cores.

    It shows that everything runs on the real records. It learns nothing worth having.
    """
    config.model, config.weights, config.dtype = "qwen3_0p6b", "random", "float32"
    config.architecture = {
        "num_layers": 2,
        "width": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "mlp_width": 128,
    }
    config.data.max_prompt_tokens = min(4096, config.data.max_prompt_tokens)
    config.rollout.rollouts_per_prompt = min(4, config.rollout.rollouts_per_prompt)
    is_annotated = build_estimator(config).rationale == "annotated"
    config.rollout.rationale_budget = _ANNOTATED if is_annotated else 24
    config.rollout.answer_reserve = 32
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 6
    config.train.prompts_per_step = 4
    config.train.rollouts_per_microbatch = config.train.prompts_per_microbatch = 0
    config.rollout.prompts_per_wave, config.mesh.tensor = 0, 1
    config.train.rollouts_every = 2
    config.evaluation.every = 3
    config.evaluation.prompts = 8
    config.evaluation.prompts_per_batch = 4
    config.evaluation.rollouts_per_prompt = 4
    config.checkpoint.every = 3
