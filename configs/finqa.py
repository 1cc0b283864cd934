"""FinQA, the paper's Section 7: cold and warm start, every estimator.

    python -m qlog.main --config=configs/finqa.py                         # cold, GARL q = 0.75
    python -m qlog.main --config=configs/finqa.py:cold,garl,q=1           # the paper's Figure 3
    python -m qlog.main --config=configs/finqa.py:cold,grpo               # the baseline: stays at 0
    python -m qlog.main --config=configs/finqa.py:warm,rb_rloo            # its Table 3

    # two CPU cores, a few minutes: a small random model on the real records
    python -m qlog.main --config=configs/finqa.py:tiny \
        --config.data.manual_dir=FOLDER_WITH_OFFICIAL_JSON --config.tokenizer.path=QWEN3_FOLDER

Cost: at most 2.1e9 rollout tokens (500 steps x 1024 x 4,096), 1.3e19 FLOPs at 10 per parameter and
token: 9 hours at 400 TFLOP/s, plus decoding, which waits for memory. Computed, not measured.
Expected (paper, Tables 1 and 3; p@1 / p@16 / m@16 in %): cold GARL q = 0.75 30.5 / 61.1 / 38.3,
q = 1 21.9 / 58.7 / 33.5, q <= 0.5 and GRPO 0 / 0 / 0; warm m@16: base 12.6, GRPO 26.9, RB-RLOO
38.3, GARL q = 0.25 38.7 and q = 0.75 37.6, PAFT q = 0.25 26.6 and q = 0.75 28.6.
Not run with Qwen3's weights: none of these numbers is ours. Only `tiny` was tried.
"""

from ml_collections import ConfigDict

from qlog.config import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper.experiment(
        arg, dataset="finqa", total_budget=4096, max_prompt_tokens=4096, tensor=2
    )
