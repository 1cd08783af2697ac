"""Which rows of a batch the positive prompt has: core evaluates several conditionings at once."""

import math

import torch

KEY = "lcm_kit.negative_prompt"
_BY_CHUNK = ("cond_or_uncond", "uuids")  # transformer_options with an entry for each conditioning


def remember_positive(executor, x, timestep, model_options=None, seed=None):
    """Around a guider's predict_noise: keeps which conditionings are its positive prompt."""
    positive = getattr(executor.class_obj, "conds", {}).get("positive")
    if positive:
        uuids = frozenset(cond["uuid"] for cond in positive if "uuid" in cond)
        model_options = _with_option(model_options, "positive_uuids", uuids)
    return executor(x, timestep, model_options, seed)


def find_positive(executor, model, conds, x_in, timestep, model_options):
    """Around calc_cond_batch: says which entries of `conds` are the positive prompt.

    Their place does not tell: DualCFGGuider puts it last, and Self-Attention Guidance evaluates the negative alone. A
    single uuid does not either: core copies a positive area, uuid and all, to the negatives. So all have to match.
    """
    uuids = (model_options.get("transformer_options", {}).get(KEY) or {}).get("positive_uuids")
    if uuids:
        places = frozenset(i for i, cond in enumerate(conds) if cond and all(c.get("uuid") in uuids for c in cond))
        model_options = _with_option(model_options, "places", places)
    return executor(model, conds, x_in, timestep, model_options)


def _with_option(model_options, name, value) -> dict:
    model_options = dict(model_options or {})
    options = dict(model_options.get("transformer_options", {}))
    options[KEY] = {**options.get(KEY, {}), name: value}
    return model_options | {"transformer_options": options}


def positive_rows(options: dict, rows: int) -> "Rows | None":
    """Where the positive prompt is in a model call with `rows` rows and these transformer_options; None if it is not."""
    places = options.get(KEY, {}).get("places", [0])  # without a guider the positive prompt comes first
    chunks = options.get("cond_or_uncond", [0])
    guided = [i for i, place in enumerate(chunks) if place in places]
    return Rows(guided, len(chunks), rows) if guided else None


def of_chunks(chunks: slice, options: dict) -> dict:
    """transformer_options of these chunks of a batch alone."""
    return options | {name: options[name][chunks] for name in _BY_CHUNK if name in options}


class Rows:
    """Which rows of a batch belong to the positive prompt: chunks `guided` of `chunks`, `all` rows in total."""

    def __init__(self, guided: list[int], chunks: int, rows: int):
        self.guided, self.chunks, self.all, self.each = guided, chunks, rows, rows // chunks
        self.whole = len(guided) == chunks
        self.tokens = 0  # of the positive texts, known once they are there

    def of(self, tensor):
        return tensor if self.whole else torch.cat([tensor.chunk(self.all // self.each)[i] for i in self.guided])

    def put(self, tensor, changed):
        if self.whole:
            return changed
        chunks = list(tensor.chunk(self.all // self.each))
        for i, chunk in zip(self.guided, changed.chunk(len(self.guided)), strict=True):
            chunks[i] = chunk
        return torch.cat(chunks)

    def spread(self, negative, chunks=None):
        """(images, ...) -> one row for each guided row, or for each row of so many chunks.

        Fewer texts than images repeat, as core has it.
        """
        chunks = chunks or len(self.guided)
        ones = (1,) * (negative.ndim - 1)
        if len(negative) == 1:
            return negative.expand(self.each * chunks, *negative.shape[1:])
        times = math.ceil(self.each / len(negative))
        return negative.repeat(times, *ones)[: self.each].repeat(chunks, *ones)

    def options(self, options: dict) -> dict:
        """For another patch, which may sort its rows by these."""
        return options | {name: [options[name][i] for i in self.guided] for name in _BY_CHUNK if name in options}

    def doubled(self, value):
        """What a model is given for a batch, with the guided rows once more behind it: tensors, and lists of them."""
        if isinstance(value, torch.Tensor):
            return torch.cat([value, self.of(value)]) if value.ndim and len(value) == self.all else value
        if isinstance(value, dict):
            return {name: self.doubled(one) for name, one in value.items()}
        return [self.doubled(one) for one in value] if isinstance(value, list) else value

    def doubled_options(self, options: dict) -> dict:
        again = self.options(options)
        return options | {name: [*options[name], *again[name]] for name in _BY_CHUNK if name in options}
