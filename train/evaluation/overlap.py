"""Answers against references: BLEU (sacrebleu), ROUGE-1, -2 and -L (rouge-score), exact match."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from train.evaluation.intervals import interval, mean_interval
from train.evaluation.judgement import Judgement
from train.evaluation.options import Options
from train.evaluation.targets import Sampling, Target
from train.evaluation.task_files import Example, prompt_of

ROUGE = ("rouge1", "rouge2", "rougeL")


def judge(target: Target, examples: Sequence[Example], options: Options) -> Judgement:
    sampling = Sampling(options.max_tokens, options.temperature, options.seed, options.stop)
    answers = target.generate([prompt_of(example, chat=options.chat) for example in examples], sampling)
    references = [example["reference"] for example in examples]
    return compare(answers, [[each] if isinstance(each, str) else each for each in references], seed=options.seed)


def compare(answers: Sequence[str], references: Sequence[Sequence[str]], *, seed: int) -> Judgement:
    """BLEU is the corpus's, 0 to 100, with sacrebleu's defaults (13a tokens, exponential smoothing).

    ROUGE is the mean F1, 0 to 1, without stemming, of the best reference of each. Exact match leaves out the blanks at
    both ends.
    """
    metric = BLEU(effective_order=True)  # silent on single sentences; it does not change what is counted in them
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    statistics, rows = [], []
    for answer, wanted in zip(answers, references, strict=True):
        score = metric.sentence_score(answer, list(wanted))
        statistics.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
        rouge = scorer.score_multi(list(wanted), answer)
        exact = float(answer.strip() in [text.strip() for text in wanted])
        rows.append({"exact_match": exact} | {name: rouge[name].fmeasure for name in ROUGE})
    columns = {name: [row[name] for row in rows] for name in ("exact_match", *ROUGE)}
    return Judgement(
        metrics={"bleu": bleu(np.sum(statistics, axis=0))} | {k: sum(v) / len(v) for k, v in columns.items()},
        intervals={"bleu": interval(statistics, bleu, seed=seed)}
        | {name: mean_interval(values, seed=seed) for name, values in columns.items()},
        counts={"answers": len(rows)},
        answers=[{"answer": answer} | row for answer, row in zip(answers, rows, strict=True)],
    )


def bleu(sums: NDArray[np.float64]) -> float:
    """Of (n-grams found, n-grams, the answers' length, the references' length)."""
    numbers = sums.astype(int).tolist()
    found, made, (length, wanted) = numbers[:4], numbers[4:8], numbers[8:]
    return float(BLEU.compute_bleu(found, made, length, wanted, smooth_method="exp").score)
