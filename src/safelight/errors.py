"""The errors of Safelight.

SafelightError
├── SafetyBypassed      a guard could not do its work; no image leaves
├── UnsupportedPipeline no backbone knows this pipeline, or something attached to it conflicts with guards
├── PromptRequired      a guard reads the prompt, and the pipeline was given embeddings only
└── ArtefactError       a file is damaged, or was made for another model
"""

from __future__ import annotations


class SafelightError(Exception):
    """Base of all errors that name a cause and a remedy."""


class SafetyBypassed(SafelightError, RuntimeError):
    """A guard was attached and yet could not act; the images are withheld."""


class UnjudgedImageWarning(UserWarning):
    """Pictures go into a guarded pipeline, and no method of its guards looks at pictures."""


class UnsupportedPipeline(SafelightError, TypeError):
    """A pipeline, or a setting of it, with which guards can't work."""


class PromptRequired(SafelightError, ValueError):
    """A guard needs the prompt's text, and the pipeline was called with `prompt_embeds` only."""


class ArtefactError(SafelightError, ValueError):
    """An artefact is damaged, incomplete, or was made for another model."""
