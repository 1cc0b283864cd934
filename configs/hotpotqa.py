"""HotPotQA (distractor setting), the paper's Section 7: cold and warm start, every estimator.

    python -m qlog.main --config=configs/hotpotqa.py                      # cold, GARL q = 0.75
    python -m qlog.main --config=configs/hotpotqa.py:cold,grpo            # the baseline
    python -m qlog.main --config=configs/hotpotqa.py:warm,paft,q=0.25     # the paper's Figure 4
    python -m qlog.main --config=configs/hotpotqa.py:warm,garl,q=0.25 --config.loss.pathwise=False

    # two CPU cores, a few minutes: a small random model on the real records
    python -m qlog.main --config=configs/hotpotqa.py:tiny \
        --config.data.manual_dir=FOLDER_WITH_OFFICIAL_JSON --config.tokenizer.path=QWEN3_FOLDER

Cost: at most 1.6e9 rollout tokens (500 steps x 1024 x 3,072), 9e18 FLOPs at 10 per parameter and
token: 7 hours at 400 TFLOP/s, plus decoding, which waits for memory. Computed, not measured.
Expected (paper, Tables 2 and 3; p@1 / p@16 / m@16 in %): cold GARL q = 0.75 53.5 / 74.1 / 57.2,
cold GARL q = 1 48.7 / 75.5 / 56.6, warm GRPO 29.1 / 55.1 / 33.5, warm PAFT q = 0.75 m@16 47.9.
Not run with Qwen3's weights: none of these numbers is ours. Only `tiny` was tried.
"""

from ml_collections import ConfigDict

from qlog.config import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper.experiment(arg, dataset="hotpotqa", total_budget=3072, max_prompt_tokens=3072)
