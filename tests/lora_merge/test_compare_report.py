import csv
import io
import json
from dataclasses import replace

import pytest
from PIL import Image, ImageChops

from lcm_kit.lora_merge import Lora, load, parse_block_strengths, save
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.comparing.canvas import Canvas, _round
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.comparing.picture import WIDTH, _rows, draw
from lcm_kit.lora_merge.comparing.report import as_csv, as_json, as_text
from lcm_kit.lora_merge.naming.unet import Layout
from lcm_kit.lora_merge.recognise import transformers
from lcm_kit.tests.lora_merge.make import factors, kohya

BLOCKS = [f"lora_unet_double_blocks_{n}_img_attn_qkv" for n in range(40)]


def lora(seed, names=BLOCKS[:3], source="LoRA", rank=3):
    tensors = {}
    for number, name in enumerate(names):
        tensors |= kohya(name, *factors(12, rank, 10, seed=100 * seed + number), 2.0)
    return Lora.from_state_dict(tensors, source=source)


def test_the_text_begins_with_an_answer_in_words():
    found = compare([(lora(1, source="style.safetensors"), 0.8), (lora(2, source="lcm.safetensors"), 1.0)])
    text = as_text(found, 4)
    assert "style * 0.8: norm" in text
    assert "LoRA rank 3 alpha 2 (scale 0.666667): 3" in text
    assert text.count("<- this rank") == 1
    assert text.splitlines()[0].startswith("Will they fight? ")
    assert text.splitlines()[1].startswith("  style and lcm: independent, cosine")
    assert "\n\n\n" not in text


def test_equal_file_names_are_told_apart():
    assert compare([(lora(1), 1.0), (lora(2), 1.0)]).labels == ("LoRA (1)", "LoRA (2)")


def test_csv_has_a_row_for_each_module_and_json_all_figures():
    found = compare([(lora(1), 0.5), (lora(2, BLOCKS[1:5]), -1.0)])
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["module"] for row in rows] == BLOCKS[:5]
    assert rows[0]["norm_2"] == rows[0]["cosine_1_2"] == ""
    assert float(rows[1]["cosine_1_2"]) == found.modules[1].pairs[0].cosine
    assert (rows[1]["rank_1"], rows[1]["alpha_1"], rows[1]["effective_rank_1"]) == ("3", "2.0", "3")
    told = json.loads(as_json(found, 2))
    assert told["whole"]["norms"] == [found.norm(0), found.norm(1)]
    assert told["inputs"][0]["only_here"] == [BLOCKS[0]]
    assert told["modules"][1]["pairs"][0]["right_chance"] == pytest.approx(3 / 10)
    assert told["cut"]["kept"][1][2] == found.retention(1, 2)
    assert [block["name"] for block in told["blocks"]] == [f"unet double_blocks.{n}" for n in range(5)]


def figures(told, path=()):
    """Where each figure of as_json stands -> the figure."""
    if isinstance(told, dict | list):
        for name, one in told.items() if isinstance(told, dict) else enumerate(told):
            yield from figures(one, (*path, name))
    else:
        yield path, told


@pytest.mark.parametrize("power", [-30, -2, 30])
def test_nothing_that_is_relative_depends_on_the_size_of_all_loras(power):
    """Nor what is said of it: norms are 2 ** power times as large, and all else is what it was."""

    def found(size):
        inputs = [(lora(1), 0.5), (lora(2, BLOCKS[1:5]), -1.0), (lora(1, BLOCKS[2:4]), 0.25)]
        sized = [(replace(one, modules={name: replace(layer, alpha=2.0 * size) for name, layer in one.modules.items()}), s)
                 for one, s in inputs]  # fmt: skip
        return compare(sized)

    plain, other = found(1.0), found(2.0**power)
    wanted, told = (dict(figures(json.loads(as_json(one, 2)))) for one in (plain, other))
    assert wanted.keys() == told.keys()
    for path, figure in wanted.items():
        if {"norm", "norms", "norm_of_sum"} & {*path}:
            assert told[path] == pytest.approx(figure * 2.0**power, rel=1e-6), path
        elif isinstance(figure, float) and not {"alpha", "scale"} & {*path}:
            assert told[path] == pytest.approx(figure, rel=1e-6, abs=1e-6), path
        elif not {"alpha", "scale"} & {*path}:
            assert told[path] == figure, path
    assert other.whole.pairs[0].cosine_deviation == pytest.approx(plain.whole.pairs[0].cosine_deviation)
    lines, others = (as_text(one, 2).splitlines() for one in (plain, other))
    assert len(lines) == len(others)
    assert [line for line in lines if "times as strong" in line] == [
        line for line in others if "times as strong" in line
    ]
    assert (
        lines[lines.index("Of the merge: rank 9 is exact, 0.0 MB in float16. Cut to a smaller rank:") :]
        == others[others.index("Of the merge: rank 9 is exact, 0.0 MB in float16. Cut to a smaller rank:") :]
    )


def test_without_a_rank_none_is_marked():
    found = compare([(lora(1), 0.5), (lora(2), 1.0)])
    assert as_text(found) == as_text(found, 0)
    assert "<- this rank" not in as_text(found)
    assert as_json(found) == as_json(found, 0)
    assert json.loads(as_json(found))["rank"] is None


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_picture_is_as_wide_as_promised_and_not_taller_than_a_screen(count):
    found = compare([(lora(n, BLOCKS), 1.0 - 0.3 * n) for n in range(count)])
    image = draw(found, 4)
    assert image.mode == "RGB"
    assert image.width == WIDTH == 1024
    assert image.height < 1000
    assert len(image.resize((256, 180)).getcolors(256 * 180)) > 50  # charts, not an empty sheet


@pytest.mark.parametrize("name", ["Qwen-Image", "Wan 2.1/2.2 14B", "Flux.1", "HunyuanVideo", "Z-Image"])
def test_every_block_of_a_deep_model_has_a_row_of_its_own_under_the_name_that_strengths_take(name):
    base = transformers.BY_NAME[name]
    firsts = [
        f"lora_unet_{stack}_{n}_{next(iter(block))}"
        for stack, blocks in base.stacks.items()
        for n, block in enumerate(blocks)
    ]
    found = compare([(lora(seed, firsts), 1.0) for seed in (1, 2)])
    rows = [row.name for row in _rows(found)]
    assert sorted(rows) == sorted(f"{stack}.{n}" for stack, blocks in base.stacks.items() for n in range(len(blocks)))
    for row in rows:
        assert parse_block_strengths(f"{row}=0").met(firsts, Layout()) == {row}
    assert 600 < draw(found).height < 1200
    told = as_text(found)
    assert all(f" {row} " in told for row in rows)


def test_more_blocks_than_fit_share_rows():
    many = [f"lora_unet_layers_{n}_a" for n in range(150)]
    found = compare([(lora(1, many), 1.0)])
    assert [row.name for row in _rows(found)][:2] == ["layers.0-3", "layers.4-7"]
    assert draw(found).height < 1200


def test_the_sweep_and_the_cut_are_in_the_picture():
    found = compare([(lora(1), 1.0), (lora(2), 1.0)])
    plain, cut = draw(found), draw(found, 4)
    assert plain.tobytes() != cut.tobytes()
    assert cut.tobytes() == draw(found, 4).tobytes()


def test_nothing_comparable_still_gives_a_text_and_a_picture():
    carried = Lora.from_state_dict(kohya("m", *factors(6, 2, 5)) | {"m.dora_scale": factors(6, 1, 1)[0]})
    found = compare([(carried, 1.0)])
    assert "not compared: 1 module of kind DoRA" in as_text(found)
    assert draw(found).width == WIDTH
    assert json.loads(as_json(found))["modules"] == []


def test_a_text_too_long_loses_its_middle():
    canvas = Canvas(200, 40)
    canvas.text((0, 0), "a_very_long_name_of_a_file_that_goes_on_and_on", width=100)
    right = canvas.image().crop((110, 0, 200, 40))
    assert right.getcolors() == [(90 * 40, (255, 255, 255))]


def test_a_line_is_where_it_was_drawn():
    canvas = Canvas(60, 20)
    canvas.line([(10, 10), (50, 10)], (0, 0, 0), width=4)
    image = canvas.image()
    assert [image.getpixel((x, 10))[0] < 128 for x in (5, 15, 30, 45, 55)] == [False, True, True, True, False]


@pytest.mark.parametrize("anchor", ["la", "md", "rm", "mm"])
def test_what_a_text_stands_on_is_behind_all_of_it(anchor):
    canvas, plain = Canvas(120, 60), Canvas(120, 60)
    canvas.text((60, 30), "text", 20, anchor=anchor, behind=(255, 0, 0))
    plain.text((60, 30), "text", 20, anchor=anchor)
    ink = plain.image().convert("L").point(lambda value: 255 * (value < 100)).getbbox()
    bands = [canvas.image().getchannel(band) for band in "RG"]
    red = ImageChops.subtract(*bands).point(lambda value: 255 * (value > 128)).getbbox()  # and no black letter
    assert red[0] <= ink[0]
    assert red[1] <= ink[1]
    assert red[2] >= ink[2]
    assert red[3] >= ink[3]
    assert canvas.image().getpixel(((red[0] + red[2]) // 2, red[1] + 1))[0] > 200


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 50, [0, 10, 20, 30, 40, 50]), (3, 3, [3])]
)
def test_an_axis_has_both_of_its_ends(low, high, ticks):
    assert _round(low, high) == pytest.approx(ticks)


def test_the_command_prints_and_writes(tmp_path, capsys):
    for number, name in enumerate(("style", "lcm")):
        save(lora(number), tmp_path / f"{name}.safetensors")
    files = {end: tmp_path / f"out.{end}" for end in ("csv", "json", "png")}
    options = ["--csv", files["csv"], "--json", files["json"], "--picture", files["png"], "--rank", 4]
    inputs = [f"{tmp_path / 'style.safetensors'}:0.8", tmp_path / "lcm.safetensors"]
    assert main([str(word) for word in ("compare", *inputs, *options)]) == 0
    told = capsys.readouterr().out
    found = compare([(load(tmp_path / "style.safetensors"), 0.8), (load(tmp_path / "lcm.safetensors"), 1.0)])
    assert told.startswith(as_text(found, 4))
    assert files["csv"].read_text(encoding="utf-8") == as_csv(found)
    assert json.loads(files["json"].read_text(encoding="utf-8"))["rank"] == 4
    with Image.open(files["png"]) as image:
        assert image.size == draw(found, 4).size
    assert main([str(word) for word in ("compare", *inputs, *options)]) == 2
    assert "exists already; choose another name or allow overwriting" in capsys.readouterr().err
    before = {end: file.read_bytes() for end, file in files.items()}
    assert main([str(word) for word in ("compare", *inputs, *options, "--overwrite")]) == 0
    assert {end: file.read_bytes() for end, file in files.items()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "lcm.safetensors", "out.csv", "out.json", "out.png", "style.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize(("option", "name"), [("--csv", "x.csv"), ("--json", "x.json"), ("--picture", "x.jpg"),
                                              ("--csv", "style.safetensors"), ("--picture", "x.png")])  # fmt: skip
def test_the_command_replaces_what_it_wrote_itself_only(tmp_path, capsys, option, name):
    save(lora(0), tmp_path / "style.safetensors")
    path = tmp_path / name
    if path.suffix == ".png":
        Image.new("RGB", (8, 8)).save(path)
    elif not path.exists():
        path.write_bytes(b"precious")
    before = path.read_bytes()
    command = ["compare", str(tmp_path / "style.safetensors"), option, str(path)]
    assert main([*command, "--overwrite"]) == 2
    assert "is not replaced" in capsys.readouterr().err
    assert path.read_bytes() == before
    if name != "style.safetensors":
        assert main([*command, "--overwrite-any"]) == 0
        assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rank", "-1"], "--rank is -1"),
        (["--picture", "a.txt"], "has to end in .png or .jpg"),
        (["--csv", "no/such/folder.csv"], "there is no such folder"),
        (["--csv", "."], "is a folder"),
        (["--csv", "con"], "device"),
        (["--csv", "x", "--json", "x"], "two of these are one file"),
    ],
)
def test_bad_options_are_refused_before_the_work(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(lora(0), tmp_path / "a.safetensors")
    assert main(["compare", "a.safetensors", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1, 3, 8, 9])
def test_the_table_of_cuts_has_a_row_for_every_rank_and_a_column_for_every_input(rank):
    found = compare([(lora(1, rank=6), 0.5), (lora(2, rank=3), 1.0)])
    head, *rows = as_text(found, rank).split("Cut to a smaller rank:\n")[1].split("\n\n")[0].splitlines()
    assert head.split() == "rank error MB keeps of 1 keeps of 2".split()
    # Of rank 6 + 3 nothing is cut at 9.
    ranks = sorted({4, 8, rank} - {0, 9})
    assert [row.split()[0] for row in rows] == [str(r) for r in ranks]
    for r, row in zip(ranks, rows, strict=True):
        kept = [word for index in (0, 1) for word in (f"{100 * found.retention(index, r):.1f}", "%")]
        mark = "<- this rank".split() if r == rank else []
        assert row.split() == [str(r), f"{found.error_at(r):.3g}", f"{found.megabytes(r):.1f}", *kept, *mark]
