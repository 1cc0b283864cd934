"""MuSiQue (answerable), the paper's Section 7: cold and warm start, every estimator.

    python -m qlog.main --config=configs/musique.py                       # cold, GARL q = 0.75
    python -m qlog.main --config=configs/musique.py:cold,garl,q=1
    python -m qlog.main --config=configs/musique.py:warm,grpo             # the baseline
    python -m qlog.main --config=configs/musique.py:warm,paft,q=0.75      # the paper's Table 3

    # two CPU cores, a few minutes: a small random model on the real records
    python -m qlog.main --config=configs/musique.py:tiny \
        --config.data.manual_dir=FOLDER_WITH_OFFICIAL_JSONL --config.tokenizer.path=QWEN3_FOLDER

Cost: at most 1.0e9 rollout tokens (500 steps x 1024 x 2,048), 6e18 FLOPs at 10 per parameter and
token: 4 hours at 400 TFLOP/s, plus decoding, which waits for memory, and the longest prompts of
the three datasets (2,400 tokens in the median). Computed, not measured.
Expected (paper, Tables 2 and 3; p@1 / p@16 / m@16 in %): cold GARL q = 0.75 26.8 / 58.9 / 34.8,
q = 1 21.6 / 58.1 / 32.5, warm GRPO 13.6 / 37.3 / 15.8; warm m@16: base 8.9, RB-RLOO 9.1, GARL
q = 0.25 24.3 and q = 0.75 19.7 (peaks before collapse), PAFT q = 0.25 9.0 and q = 0.75 22.4.
Not run with Qwen3's weights: none of these numbers is ours. Only `tiny` was tried.
"""

from ml_collections import ConfigDict

from qlog.config import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper.experiment(arg, dataset="musique", total_budget=2048, max_prompt_tokens=5120)
