"""The tiny text encoder: words, not letters, and two transformer layers that see the whole caption."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

CONTEXT_DIM = 128
HEADS = 4
LAYERS = 2
MAX_WORDS = 12  # tokens, the start and end marks included


class WordTokenizer:
    """Whole words of vocabulary.txt, in ComfyUI's tokenizer protocol. Words it does not know are left out."""

    SPECIAL = {"start": 0, "end": 1, "pad": 1}  # noqa: RUF012 - read-only, the shape ComfyUI expects

    def __init__(self):
        words = (Path(__file__).parent / "vocabulary.txt").read_text(encoding="utf-8").split()
        self.vocab = {"<start>": 0, "<end>": 1} | {word: i + 2 for i, word in enumerate(words)}

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        return cls()

    def __call__(self, text):
        words = re.findall(r"[a-z]+", text.lower())
        return {"input_ids": [0, *(self.vocab[w] for w in words if w in self.vocab), 1]}

    def get_vocab(self):
        return self.vocab


class Layer(torch.nn.Module):
    """Pre-norm transformer layer. Out of place, unlike ComfyUI's CLIPLayer, so that it can be trained."""

    def __init__(self, dtype, device, operations):
        super().__init__()
        at = {"dtype": dtype, "device": device}
        self.norm1 = operations.LayerNorm(CONTEXT_DIM, **at)
        self.qkv = operations.Linear(CONTEXT_DIM, 3 * CONTEXT_DIM, **at)
        self.out = operations.Linear(CONTEXT_DIM, CONTEXT_DIM, **at)
        self.norm2 = operations.LayerNorm(CONTEXT_DIM, **at)
        self.fc1 = operations.Linear(CONTEXT_DIM, 4 * CONTEXT_DIM, **at)
        self.fc2 = operations.Linear(4 * CONTEXT_DIM, CONTEXT_DIM, **at)

    def forward(self, x):
        """x: (b, words, CONTEXT_DIM)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextTransformer(torch.nn.Module):
    """The `transformer` of ComfyUI's SDClipModel: embeddings (b, words, CONTEXT_DIM) in, context out."""

    def __init__(self, config, dtype, device, operations):
        super().__init__()
        self.num_layers = LAYERS
        self.dtype = dtype
        at = {"dtype": dtype, "device": device}
        self.words = operations.Embedding(len(WordTokenizer().vocab), CONTEXT_DIM, **at)
        self.positions = operations.Embedding(MAX_WORDS, CONTEXT_DIM, **at)
        self.layers = torch.nn.ModuleList(Layer(dtype, device, operations) for _ in range(LAYERS))
        self.norm = operations.LayerNorm(CONTEXT_DIM, **at)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_tokens, attention_mask=None, embeds=None, num_tokens=None, **kwargs):
        x = self.words(input_tokens, out_dtype=torch.float32) if embeds is None else embeds
        x = x + self.positions(torch.arange(x.shape[1], device=x.device), out_dtype=torch.float32)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x, None, x[:, 0]
