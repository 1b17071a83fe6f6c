"""The testbed's tokenizer: one word, one token."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .world import words

PAD, EOS, BOS, UNKNOWN = 0, 1, 2, 3
LENGTH = 16  # tokens of a prompt, markers included


@cache
def vocabulary() -> dict[str, int]:
    """Word -> id; the markers come first."""
    return {word: index for index, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *words()])}


class TestbedTokenizer(PreTrainedTokenizerFast):
    """Never pads beyond the model's length: FLUX asks for 512 tokens where 16 hold every prompt of this world."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("padding") == "max_length":
            kwargs["max_length"] = min(kwargs.get("max_length") or LENGTH, LENGTH)
        return super().__call__(*args, **kwargs)


def build(kind: Literal["clip", "t5"]) -> TestbedTokenizer:
    """A tokenizer for one of the text encoders: CLIP's begins with a marker, both end with one."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s<>/]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin = "<s> " if kind == "clip" else ""
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin}$A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return TestbedTokenizer(
        tokenizer_object=tokenizer, model_max_length=LENGTH, pad_token="<pad>", eos_token="</s>", bos_token="<s>",
        unk_token="<unk>",
    )  # fmt: skip
