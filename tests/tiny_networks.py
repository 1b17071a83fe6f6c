"""Networks of the judges' real classes, as small as they get, with random or hand-written weights, saved as the hub's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers


def tokenizer(words: list[str], **special: Any) -> Any:
    """Splits at these words and at blanks; the first four are padding, end, begin and unknown."""
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[3]))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=words[0], eos_token=words[1], bos_token=words[2], unk_token=words[3], **special
    )


def vit(folder: Path, labels: tuple[str, ...] = ("normal", "nsfw")) -> str:
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        id2label=names, label2id={name: index for index, name in names.items()}, initializer_range=0.5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def clip(folder: Path) -> str:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    words = ["<pad>", "<end>", "<begin>", "<unknown>", "a", "cat", "knife", "good", "bad"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer(words)).save_pretrained(folder)
    return str(folder)


def shield_gemma(folder: Path) -> str:
    from transformers import ShieldGemma2Config, ShieldGemma2ForImageClassification, ShieldGemma2Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    torch.manual_seed(0)
    words = [
        "<pad>",
        "<end>",
        "<begin>",
        "<unknown>",
        "<boi>",
        "<eoi>",
        "<image>",
        "Yes",
        "No",
        "Dangerous",
        "Sexually",
        "Violence/Gore",
        "Beer",
    ]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "gemma3_text", "vocab_size": len(words), "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    config = ShieldGemma2Config(
        text_config={**sizes, **text},
        vision_config={**sizes, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4, boi_token_index=4, eoi_token_index=5, image_token_index=6,
    )  # fmt: skip
    config.yes_token_index, config.no_token_index = 7, 8
    network = ShieldGemma2ForImageClassification(config)
    for name, weight in network.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.3)  # the projector starts as zeros: it would see nothing
    network.save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %} <boi> {% else %} {{ c['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}"
    )
    special = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    ShieldGemma2Processor(
        pictures, tokenizer(words, extra_special_tokens=special), image_seq_length=4, chat_template=template
    ).save_pretrained(folder)
    return str(folder)


def llava(folder: Path, answer: list[str]) -> str:
    """A LLaVA that says these words whatever it sees: each word's logits name the next, by hand-written weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    words = ["<pad>", "<end>", "<begin>", "<unknown>", "<image>", "ASSISTANT:", *answer]
    width = 8 * -(-len(words) // 8)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={**sizes, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 16},
        text_config={
            "model_type": "llama", "vocab_size": len(words), "hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        },
        image_token_index=4, tie_word_embeddings=False,
    )  # fmt: skip
    network = LlavaForConditionalGeneration(config)
    layer = network.model.language_model.layers[0]
    following = [*range(6, 6 + len(answer)), 1]  # after "ASSISTANT:", word by word, then the end
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        network.model.language_model.embed_tokens.weight.copy_(torch.eye(len(words), width))
        network.lm_head.weight.zero_()
        for word, after in zip(range(5, 6 + len(answer)), following, strict=True):
            network.lm_head.weight[after, word] = 1
    network.generation_config.eos_token_id, network.generation_config.pad_token_id = 1, 0
    network.save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %} <image> {% else %} {{ c['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pictures, tokenizer(words, extra_special_tokens={"image_token": "<image>"}), patch_size=16, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)
