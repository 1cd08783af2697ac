"""Records hold numbers and names; what people read is written from them, in report modules alone."""

import ast
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from itertools import combinations
from pathlib import Path

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge_with_account, resize_with_account
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.extracting.extract import extract
from lcm_kit.lora_merge.merging.report import describe_merge
from lcm_kit.lora_merge.metadata.adapter_config import Misfit, unused
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.lora_merge.make import factors, kohya
from lcm_kit.tests.test_layering import fields_of_records, names_to_build, shipped_modules

# ---- no code gives a record a sentence

# Tables, which are texts of documentation, are written outside of functions. Besides, and why:
MAY = {
    "host/door/check.py": "an input that is refused, with the rule and the way out: words of the refusal, raised where it is found",
    "samplers/presets.py": "a row of the table of presets that is worked out for a number of phases",
}
# Three words or more in a row.
_SENTENCE = re.compile(r"[A-Za-z]+[,;:]? [a-z]+[,;:]? [a-z]+")


def sentences_in(call: ast.Call) -> list[str]:
    """Texts of three words or more among what a call is given, in other calls' arguments too."""
    given = [*call.args, *(one.value for one in call.keywords)]
    texts = [
        node.value
        for one in given
        for node in ast.walk(one)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [text for text in texts if _SENTENCE.search(text)]


def told(file: Path, records: Mapping[str, int], root: Path = ROOT) -> list[str]:
    """Records of a file that are built inside of functions with a sentence in them."""
    tree, names = ast.parse(file.read_text("utf-8")), names_to_build(file, records, root)
    calls = {
        call
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) in names
    }
    return [
        f"{file.relative_to(root).as_posix()}:{call.lineno} {ast.unparse(call.func)}: {text}"
        for call in calls
        for text in sentences_in(call)
    ]


@pytest.fixture(scope="module")
def records():
    return {
        ".".join(["", *file.relative_to(ROOT).with_suffix("").parts, name]): count
        for file in shipped_modules()
        for name, count in fields_of_records(file).items()
    }


def test_no_function_builds_a_record_with_a_sentence_in_it(records):
    assert len(records) > 100
    found = {file.relative_to(ROOT).as_posix(): told(file, records) for file in shipped_modules()}
    assert {file for file, offences in found.items() if offences} == MAY.keys(), found


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("def f(n):\n    return Found(n, 'name')", True),
        ("TABLE = Found(1, 'what it is for')", True),
        ("def f(n):\n    return Found(n, f'{n} of them are lost')", False),
        ("def f(n):\n    return Found(n, text=words('some of them are lost'))", False),
        ("def f(n):\n    return words('some of them are lost')", True),
        ("g = lambda n: Found(n, 'some of them are lost')", False),
    ],
)
def test_rule_of_sentences_recognises(line, allowed, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(f"class Found(NamedTuple):\n    number: int\n    text: str\n\n\n{line}\n")
    assert (told(file, {".module.Found": 2}, tmp_path) == []) is allowed


# ---- and none has one that came from elsewhere

QKV, QUERY = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_q"
NAME = "lora_unet_mid_block_attentions_0_proj_in"
NUMBERS = torch.Generator().manual_seed(1)


def plain(seed, out=8, module=NAME, **more):
    return kohya(module, *factors(out, 2, 6, seed=seed), **more)


# One of each of the odd things that are told of, without a space in any of their names.
ODD = {
    "plain": Lora.from_state_dict(plain(1), source="plain", metadata={"modelspec.license": "MIT"}),
    "other": Lora.from_state_dict(plain(2), source="other", metadata={"modelspec.license": "CC0", "ss_tag_frequency": "-"}),
    "weak": Lora.from_state_dict({key: 1e-3 * part for key, part in plain(3).items()}, source="weak"),
    "zero": Lora.from_state_dict({key: 0 * part for key, part in plain(4).items()}, source="zero"),
    "small": Lora.from_state_dict({f"{NAME}.diff": torch.full((8, 6), 1e-9)}, source="small"),
    "stray": Lora.from_state_dict(plain(5) | {"stray": torch.ones(2), f"{NAME}.scalar": torch.ones(1)}, source="stray"),
    "lcm": Lora.from_state_dict(plain(6), source="lcm", metadata={"modelspec.title": "LCM"}),
    "long": Lora.from_state_dict(plain(7), source="long", metadata={"modelspec.description": "x" * 100_001}),
    "peft": Lora.from_state_dict(
        plain(8), source="peft", metadata={"init_lora_weights": "pissa", "use_dora": "True", **unused(Misfit(NAME, 4, "8"))}
    ),
    "whole": Lora.from_state_dict(plain(9, 18, QKV), source="whole"),
    "slice": Lora.from_state_dict(
        {f"{QUERY}.hada_{part}": torch.rand(size, generator=NUMBERS)
         for part, size in {"w1_a": (6, 2), "w1_b": (2, 6), "w2_a": (6, 2), "w2_b": (2, 6)}.items()}, source="slice"),
}  # fmt: skip
WAYS = (
    {},
    {"rank": 1},
    {"method": "ties"},
    {"method": "dare", "density": 1.0},
    {"mu": 1.0, "protect": "auto"},
    {"out_dtype": torch.float16},
)


def texts(value):
    """All texts in a record, however deep; of other objects none."""
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from texts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from texts(pair)
    elif isinstance(value, Collection) and not isinstance(value, torch.Tensor):
        for one in value:
            yield from texts(one)


def sentences(record):
    return {text for text in texts(record) if _SENTENCE.search(text)}


def reason_of_a_reader(text):
    """Of metadata that cannot be read: the words of the reader, which no number stands for."""
    return text.startswith("Expecting value") or "cannot be read" in text or "JSON" in text


def test_no_account_holds_a_sentence_and_its_report_has_them_all():
    said = set()
    for names in [*combinations(ODD, 1), *combinations(ODD, 2)]:
        inputs = [(ODD[name], strength) for name, strength in zip(names, (1.0, 0.05), strict=False)]
        for options in WAYS:
            merged, account = merge_with_account(inputs, **options)
            assert {text for text in sentences(account) if not reason_of_a_reader(text)} == set(), (names, options)
            lines = describe_merge(account, merged).split("\n")
            said |= {" ".join(line.split(": ", 2)[-1].split()[:3]) for line in lines if line.startswith("Warning: ")}
    assert len(said) > 10, said


def test_no_comparison_extraction_or_resize_holds_a_sentence():
    found = [compare([(ODD[first], 1.0), (ODD[second], 0.0)]) for first, second in combinations(ODD, 2)]
    found += [resize_with_account(lora, rank=1)[1] for lora in ODD.values()]
    weights = [(f"diffusion_model.x.{n}", torch.rand(4, 3, generator=NUMBERS), torch.rand(4, 3, generator=NUMBERS))
               for n in ("weight", "bias", "other")]  # fmt: skip
    found.append(extract(weights, rank=1)[1])
    assert {text for one in found for text in sentences(one) if not reason_of_a_reader(text)} == set()


def test_a_sentence_deep_in_a_record_is_seen():
    lora = Lora.from_state_dict(plain(1), source="it is the first of them")
    account = merge_with_account([(lora, 1.0)])[1]
    assert sentences(account) == {"it is the first of them"}
    assert json.dumps(sorted(sentences(compare([(lora, 1.0)])))) == '["it is the first of them"]'
