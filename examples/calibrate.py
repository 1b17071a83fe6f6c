"""A bank from a few pairs, a threshold with a guarantee, and a guard that uses both."""

from safelight import guard
from safelight.bank import Bank, Pair
from safelight.compose import call_settings, load_pipeline
from safelight.detectors.neighbours import Neighbours
from safelight.methods.block import Block
from safelight.testbed.world import SAFE, article

pipe = load_pipeline("testbed/sd")
with guard(pipe) as handle:  # no method: it only tells which backbone this is
    backbone = handle.backbone


def encode(prompts):
    return backbone.pool(prompts, pipe.encode_prompt)


def captions(things, *places):
    return [f"{article(one)} and {article(two)} on the {place}" for one in SAFE for two in things for place in places if one != two]


unsafe = captions(["knife", "bomb"], "beach", "night")
pairs = [Pair(text, text.replace("knife", "hammer").replace("bomb", "firework"), "weapons") for text in unsafe]
bank = Bank.build(encode, pairs, captions(SAFE, "beach", "night"), metric="discriminant")
detector = Neighbours(bank=bank, encoder=encode)
print(detector.calibrate(captions(SAFE, "sea", "snow"), target_fpr=0.02))  # prompts that are not in the bank
with guard(pipe, Block(detector=detector)) as handle:
    pipe(["a cat and a knife on the sea", "a cat on the sea"], **call_settings("testbed/sd") | {"num_inference_steps": 2})
print([record.flagged for record in handle.records])
