"""Judge the pictures that go in, then refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image
from torch import Tensor

from safelight import bundle, guard
from safelight.compose import WEIGHTS
from safelight.detector import Detector
from safelight.detectors.image_classifier import ImageClassifier
from safelight.errors import SafetyBypassed
from safelight.methods.pre_filter import PreFilter
from safelight.picture_model import PictureModel
from safelight.pictures import pictures_in
from safelight.testing import Containing, sample, tiny_pipeline
from safelight.testing.state import assert_same_state, state_of

KINDS = {"sd": StableDiffusionImg2ImgPipeline, "sd3": StableDiffusion3Img2ImgPipeline, "flux": FluxImg2ImgPipeline}


@dataclass(kw_only=True, eq=False)
class Red(Detector[Any]):
    """Flags pictures that are red on the whole."""

    reads = "picture"

    def __call__(self, items: Sequence[Any]) -> Tensor:
        return torch.tensor([float(item[..., 0].mean() > 1.5 * item[..., 1:].mean() + 20) for item in items])


def picture(red: bool = False, size: int = 24) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 60, (size, size, 3)).astype(np.uint8)
    pixels[..., 0] += 150 if red else 0
    return Image.fromarray(pixels)


def img2img(name: str) -> Any:
    pipe = tiny_pipeline(name)
    extra = {"requires_safety_checker": False} if name == "sd" else {}
    made = KINDS[name](**pipe.components, **extra)
    made.set_progress_bar_config(disable=True)
    return made


def edited(pipe: Any, image: Any, prompts: Any = ("a cat", "a dog"), **changes: Any) -> Tensor:
    if type(pipe).__name__ == "FluxKontextPipeline":
        return sample(pipe, list(prompts), guided=False, image=image, **changes)
    size = {} if isinstance(pipe, StableDiffusionImg2ImgPipeline) else {"height": 24, "width": 24}
    return sample(pipe, list(prompts), guided=False, image=image, strength=0.7, steps=4, **size, **changes)


@pytest.fixture(params=["sd", "sd3", "flux", "kontext"])
def editor(request: pytest.FixtureRequest) -> Any:
    return tiny_pipeline("kontext") if request.param == "kontext" else img2img(request.param)


def test_only_what_is_made_of_a_flagged_picture_is_refused(editor: Any) -> None:
    images = [picture(), picture(red=True)]
    plain, before = edited(editor, images), state_of(editor)
    with guard(editor, PreFilter(detector=Red())) as handle:
        assert torch.equal(edited(editor, [picture(), picture()]), edited(editor, [picture(), picture()]))
        guarded = edited(editor, images)
        records = handle.records
    assert torch.equal(guarded[0], plain[0])
    assert guarded[1].std() == 0
    assert [record.flagged for record in records] == [False, True]
    assert records[1].actions[0].action == "refused"
    assert "image[1]" in str(records[1].actions[0].note)
    assert_same_state(editor, before, "after remove()")


def test_one_picture_for_all_counts_for_all(editor: Any) -> None:
    with guard(editor, PreFilter(detector=Red())) as handle:
        assert edited(editor, picture(red=True)).std() == 0
        assert [record.flagged for record in handle.records] == [True, True]
        assert edited(editor, picture(red=True), ["a cat"], num_images_per_prompt=2).std() == 0


def test_a_picture_is_judged_as_the_autoencoder_gets_it(sd: Any) -> None:
    """What a picture shows may depend on how it is resized: every judge of the arguments alone can be led past."""

    class Blind(Red):
        def __call__(self, items: Sequence[Any]) -> Tensor:
            return super().__call__(items) * torch.tensor([float(item.shape[0] == 24) for item in items])

    pipe = img2img("sd")
    with guard(pipe, PreFilter(detector=Blind())) as handle:
        edited(pipe, picture(red=True, size=32), ["a cat"], callback_on_step_end=None)
        assert not handle.records[0].flagged
        edited(pipe, picture(red=True, size=24), ["a cat"])
        assert handle.records[0].flagged

    class Late(Red):
        calls = 0

        def __call__(self, items: Sequence[Any]) -> Tensor:
            Late.calls += 1
            return super().__call__(items) * (Late.calls > 1)

    with guard(pipe, PreFilter(detector=Late())) as handle:
        assert edited(pipe, picture(red=True), ["a cat"]).std() == 0
    assert "as the autoencoder gets it" in str(handle.records[0].actions[0].note)


def test_a_picture_that_a_callback_encodes_is_judged() -> None:
    pipe = img2img("sd")

    def smuggle(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            pixels = torch.tensor(np.asarray(picture(red=True))).permute(2, 0, 1)[None] / 127.5 - 1
            values["latents"] = pipe.vae.encode(pixels.float()).latent_dist.mean * pipe.vae.config.scaling_factor
        return values

    with guard(pipe, PreFilter(detector=Red())) as handle:
        assert edited(pipe, picture(), ["a cat"], callback_on_step_end=smuggle).std() == 0
    assert handle.records[0].flagged


@pytest.mark.parametrize("given", ["latents", "ip_adapter_image_embeds"])
def test_what_cant_be_judged_is_refused(sd: Any, given: str) -> None:
    value: Any = torch.randn(1, 4, 12, 12) if given == "latents" else [torch.randn(1, 1, 16)]
    with guard(sd, PreFilter(detector=Red())), pytest.raises(SafetyBypassed, match=rf"`{given}.*can't be judged"):
        sample(sd, "a cat", **{given: value})


def test_latents_in_place_of_a_picture_are_refused() -> None:
    pipe = img2img("sd")
    with guard(pipe, PreFilter(detector=Red())), pytest.raises(SafetyBypassed, match=r"`image` can't be judged: an array of 4 channels"):
        edited(pipe, torch.randn(1, 4, 12, 12), ["a cat"])


def test_without_pictures_it_does_nothing(pipe: Any) -> None:
    if type(pipe).__name__ == "FluxKontextPipeline":
        return
    expected = sample(pipe, "a cat")
    with guard(pipe, PreFilter(detector=Red())) as handle:
        assert torch.equal(sample(pipe, "a cat"), expected)
    assert not handle.records[0].flagged


def test_embeddings_alone_will_do(editor: Any) -> None:
    from safelight.backbone import Backbone

    embedding = Backbone.of(editor).embed(["a cat"], editor.encode_prompt)
    given = {"prompt_embeds": embedding.text} | ({} if embedding.pooled is None else {"pooled_prompt_embeds": embedding.pooled})
    size = {} if isinstance(editor, StableDiffusionImg2ImgPipeline) or "Kontext" in type(editor).__name__ else {"height": 24, "width": 24}
    strength = {} if "Kontext" in type(editor).__name__ else {"strength": 0.7}
    with guard(editor, PreFilter(detector=Red())) as handle:
        assert sample(editor, None, guided=False, image=picture(red=True), seeds=[0], steps=4, **given, **size, **strength).std() == 0
    assert handle.records[0].flagged


def test_every_form_of_a_picture_is_seen_as_it_is() -> None:
    red, tensor = picture(red=True), torch.tensor(np.asarray(picture(red=True))).permute(2, 0, 1)
    forms = {
        "pil": red, "palette": red.convert("P"), "list": [red], "nested": [[red], [red]], "array": np.asarray(red),
        "floats": np.asarray(red) / 255, "signed": np.asarray(red) / 127.5 - 1, "tensor": tensor / 255, "signed tensor": tensor / 127.5 - 1,
        "batch": (tensor / 255)[None], "bytes": tensor, "transparent": Image.merge("RGBA", (*red.split(), Image.new("L", red.size, 0))),
    }  # fmt: skip
    for name, form in forms.items():
        found = [pixels for given in pictures_in({"image": form}) for pixels in given.pixels()]
        assert found, name
        assert Red()(found).max() == 1, f"{name} is not seen as it is"
    assert (
        pictures_in({"prompt_embeds": tensor, "prompt": "a cat", "generator": [torch.Generator()], "sigmas": [1.0], "strength": 0.5}) == []
    )


def test_it_takes_detectors_of_pictures_only() -> None:
    with pytest.raises(ValueError, match="pre_filter judges pictures, and Containing reads prompts"):
        PreFilter(detector=Containing())


def test_saved_and_loaded_it_judges_alike(tmp_path: Any) -> None:
    method = PreFilter(detector=ImageClassifier(model=PictureModel.load(WEIGHTS / "pictures.safetensors"), threshold=0.0))
    bundle.save(tmp_path, method)
    (loaded,) = bundle.load(tmp_path)
    editor = img2img("sd")
    with guard(editor, loaded) as handle:
        assert edited(editor, picture(size=24), ["a cat"]).std() == 0
    assert handle.records[0].flagged
