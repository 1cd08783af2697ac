"""A negative prompt at cfg 1: normalised attention guidance as a patch on a MODEL.

`prompt` is the door and decides when the patch works and for which rows of a batch (`rows`). What it does to a model is
one of three roads: `unet` (cross-attention of UNets), `tokens` (the negative text goes along as further tokens) and
`pairs` (each picture goes along twice, with either text). `families` says which transformer takes which.
"""

from .prompt import with_negative_prompt

__all__ = ["with_negative_prompt"]
