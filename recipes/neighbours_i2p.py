"""Nearest neighbours on real prompts: I2P against COCO captions (easy), and harmful against harmless I2P prompts (in domain).

    python recipes/neighbours_i2p.py --i2p i2p.csv --coco coco.csv --out neighbours_i2p.json

I2P (Schramowski et al., 2023, https://arxiv.org/abs/2211.05105) is offensive text: it stays outside of this repository, and nothing but
figures is printed or written. A fifth of each file, chosen by hash, is held out and looked at once, at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.bank import PROBES, Bank, Metric, Pair
from safelight.calibration import Calibration
from safelight.detectors.neighbours import Neighbours
from safelight.encoders import SentenceEncoder
from safelight.tables import read_table

MINORS = re.compile(
    r"\b(child\w*|kids?|kiddo\w*|girl\w*|boy|boys|boyish|teen\w*|minors?|bab(?:y|ies)|toddlers?|infants?|newborn\w*|schoolgirl\w*"
    r"|schoolboy\w*|daughters?|sons?|lolita\w*|loli|preteen\w*|juvenile\w*|underage\w*|young(?:er|est)?|youth\w*|little|tiny|pupils?"
    r"|kindergarten\w*|puberty|adolescen\w*|\d{1,2}[- ]years?[- ]old)\b",
    re.IGNORECASE,
)
PERCENTAGE = "inappropriate_percentage"
HARMFUL, HARMLESS = 50, 15
"""Percentage of inappropriate pictures from which on, and up to which, an I2P prompt counts as harmful or harmless."""
FOLDS = 5


class Row(NamedTuple):
    """A prompt, the topics it is filed under, and how many per cent of its pictures were inappropriate."""

    prompt: str
    topics: tuple[str, ...]
    percentage: float

    @property
    def share(self) -> int:
        """A number 0 … 24, uniform over prompts: 0 … 4 are held out, the rest gives five folds of four."""
        return int.from_bytes(hashlib.sha256(self.prompt.encode()).digest()[:4], "big") % 25


@dataclass(frozen=True)
class Setting:
    """What cross-validation chooses."""

    statistics: str
    topics: bool
    metric: Metric
    shrinkage: float | None
    k: int
    temperature: float


class Cached:
    """A sentence encoder whose embeddings are kept in the temporary folder."""

    def __init__(self, statistics: str, prompts: Sequence[str]) -> None:
        texts = list(dict.fromkeys([*prompts, *PROBES]))
        key = hashlib.sha256("\0".join([statistics, *texts]).encode()).hexdigest()[:16]
        file = Path(tempfile.gettempdir()) / f"safelight-embeddings-{key}.safetensors"
        if not file.exists():
            save_file({"rows": SentenceEncoder(statistics=statistics)(texts)}, file)
        self.rows, self.index = load_file(file)["rows"], {text: index for index, text in enumerate(texts)}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [prompts, width]."""
        return self.rows[[self.index[prompt] for prompt in prompts]]


def read(path: Path) -> tuple[list[Row], int]:
    """The rows of a CSV file, each prompt once, and how many were refused for mentioning minors, or what sounds like it."""
    rows = [
        Row(line["prompt"], tuple(topic.strip() for topic in line.get("categories", "").split(",")), float(line.get(PERCENTAGE, 0)))
        for line in read_table(path).rows
    ]
    kept = list({row.prompt: row for row in rows if row.prompt.strip() and not MINORS.search(row.prompt)}.values())
    return kept, sum(bool(MINORS.search(row.prompt)) for row in rows)


def detector(encoder: Cached, setting: Setting, unsafe: Sequence[Row], safe: Sequence[Row]) -> Neighbours:
    """A detector that knows these prompts."""
    pairs = [Pair(row.prompt, "", row.topics[0] if setting.topics else "unsafe") for row in unsafe]
    bank = Bank.build(encoder, pairs, [row.prompt for row in safe], metric=setting.metric, shrinkage=setting.shrinkage)
    return Neighbours(bank=bank, k=setting.k, temperature=setting.temperature, encoder=encoder)


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Harmful rows, and harmless ones."""
    return [row for row in rows if row.percentage >= HARMFUL], [row for row in rows if row.percentage <= HARMLESS]


def score(judge: Neighbours, rows: Sequence[Row]) -> Tensor:
    """The score of each row, [rows]."""
    return judge([row.prompt for row in rows])


def auroc(unsafe: Tensor, safe: Tensor) -> float:
    """The probability that an unsafe item scores higher than a safe one, ties counted half; from ranks."""
    _, place, counts = torch.cat([unsafe, safe]).unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]
    return float((ranks[: len(unsafe)].double().sum() - len(unsafe) * (len(unsafe) + 1) / 2) / (len(unsafe) * len(safe)))


def with_interval(unsafe: Tensor, safe: Tensor, draws: int = 1000) -> dict[str, float]:
    """AUROC with a stratified bootstrap interval of 95 %."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([auroc(resample(unsafe, generator), resample(safe, generator)) for _ in range(draws)])
    low, high = values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"auroc": auroc(unsafe, safe), "low": low, "high": high, "unsafe": len(unsafe), "safe": len(safe)}


def resample(scores: Tensor, generator: torch.Generator) -> Tensor:
    """As many scores, drawn with replacement."""
    return scores[torch.randint(len(scores), (len(scores),), generator=generator)]


def at_threshold(calibration: Calibration, unsafe: Tensor, safe: Tensor) -> dict[str, Any]:
    """What a calibrated threshold catches, and flags by mistake, among held-out rows."""
    caught, flagged = int((unsafe > calibration.threshold).sum()), int((safe > calibration.threshold).sum())
    return {
        "calibration": json.loads(calibration.to_json()), "recall": caught / len(unsafe), "caught": caught, "unsafe": len(unsafe),
        "false_positive_rate": flagged / len(safe), "flagged": flagged, "safe": len(safe),
    }  # fmt: skip


def easy(i2p: Sequence[Row], coco: Sequence[Row], encoder: Cached, metric: Metric, k: int) -> dict[str, Any]:
    """I2P against COCO, nothing tuned; a fifth of the captions calibrates and is not in the bank."""
    known = [row for row in coco if row.share >= 10]
    calibrating = [row for row in coco if 5 <= row.share < 10]
    held_out, captions = [row for row in i2p if row.share < 5], [row for row in coco if row.share < 5]
    judge = detector(encoder, Setting("mean", True, metric, None, k, 0.05), [row for row in i2p if row.share >= 5], known)
    calibration = Calibration.fit(score(judge, calibrating).tolist(), items=[row.prompt for row in calibrating])
    unsafe, safe = score(judge, held_out), score(judge, captions)
    topics = sorted({topic for row in held_out for topic in row.topics})
    rows = {topic: torch.tensor([topic in row.topics for row in held_out]) for topic in topics}
    return {
        "all": with_interval(unsafe, safe), "topics": {topic: with_interval(unsafe[mask], safe) for topic, mask in rows.items()},
        "at 1 % false positives": at_threshold(calibration, unsafe, safe),
    }  # fmt: skip


def settings() -> list[Setting]:
    """What cross-validation tries."""
    metrics: list[tuple[Metric, float | None]] = [("cosine", None), ("discriminant", None), ("discriminant", 0.6), ("discriminant", 0.9)]
    grid = itertools.product(("mean", "mean+middle", "mean+max+middle"), (False, True), metrics, (5, 50, 100, 200), (0.05, 1.0))
    return [
        Setting(statistics, topics, metric, shrinkage, k, temperature)
        for statistics, topics, (metric, shrinkage), k, temperature in grid
        if metric == "discriminant" or not topics  # topics change nothing but the metric
    ]


def cross_scores(encoder: Cached, group: Sequence[Setting], rows: Sequence[Row]) -> dict[Setting, Tensor]:
    """Out-of-fold scores of `rows` for settings that differ in k and temperature only."""
    scores = {setting: torch.zeros(len(rows)) for setting in group}
    for fold in range(FOLDS):
        own = torch.tensor([row.share % FOLDS == fold for row in rows])
        known = [row for row, inside in zip(rows, own.tolist(), strict=True) if not inside]
        asked = [row for row, inside in zip(rows, own.tolist(), strict=True) if inside]
        bank = detector(encoder, group[0], *halves(known)).bank
        for setting in group:
            scores[setting][own] = score(Neighbours(bank=bank, k=setting.k, temperature=setting.temperature, encoder=encoder), asked)
    return scores


def in_domain(i2p: Sequence[Row], encoders: Mapping[str, Cached]) -> dict[str, Any]:
    """Harmful against harmless I2P prompts; everything is chosen on the bank part."""
    clear = [row for row in i2p if row.percentage >= HARMFUL or row.percentage <= HARMLESS]
    known, held_out = [row for row in clear if row.share >= 5], [row for row in clear if row.share < 5]
    harmful = torch.tensor([row.percentage >= HARMFUL for row in known])
    scores: dict[Setting, Tensor] = {}
    for _, group in itertools.groupby(settings(), lambda setting: replace(setting, k=0, temperature=0)):
        members = list(group)  # all that share a bank
        scores |= cross_scores(encoders[members[0].statistics], members, known)
    quality = {setting: auroc(values[harmful], values[~harmful]) for setting, values in scores.items()}
    best = max(quality, key=lambda setting: quality[setting])
    best_of = {metric: max(value for s, value in quality.items() if s.metric == metric) for metric in ("cosine", "discriminant")}
    calibration = Calibration.fit(scores[best][~harmful].tolist(), items=[row.prompt for row in halves(known)[1]])

    judge = detector(encoders[best.statistics], best, *halves(known))
    plain = detector(encoders["mean"], Setting("mean", False, "cosine", None, 5, 0.05), *halves(known))
    unsafe, safe = (score(judge, half) for half in halves(held_out))
    return {
        "chosen": vars(best), "settings tried": len(quality), "cross-validated, best of each metric": best_of,
        "held out": with_interval(unsafe, safe),
        "held out, default settings": with_interval(*(score(plain, half) for half in halves(held_out))),
        "at 1 % false positives, cross-fitted": at_threshold(calibration, unsafe, safe),
    }  # fmt: skip


def main() -> None:
    """Measures both, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--i2p", type=Path, required=True, help="CSV with prompt, categories, inappropriate_percentage")
    parser.add_argument("--coco", type=Path, required=True, help="CSV with prompt")
    parser.add_argument("--out", type=Path, default=Path("neighbours_i2p.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    (i2p, i2p_refused), (coco, coco_refused) = read(options.i2p), read(options.coco)
    texts = [row.prompt for row in [*i2p, *coco]]
    encoders = {name: Cached(name, texts) for name in ("mean", "mean+middle", "mean+max+middle")}
    report = {
        "rows": {"i2p": len(i2p), "i2p refused": i2p_refused, "coco": len(coco), "coco refused": coco_refused},
        "easy: I2P against COCO": {
            f"{metric}, k = {k}": easy(i2p, coco, encoders["mean"], metric, k) for metric in ("cosine", "discriminant") for k in (5, 50)
        },
        "in domain: harmful against harmless I2P": in_domain(i2p, encoders),
    }
    text = json.dumps(report, indent=2)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
