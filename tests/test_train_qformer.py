"""Training a Q-Former before a frozen encoder: resume, ranks, what is trained, its folder, its retrieval, and bad input."""

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from encoders.modeling import VisionEncoder, VisionEncoderConfig
from llm_stage import eval_retrieval, pair_features
from llm_stage.qformer import QFormerConfig
from llm_stage.qformer_build import CALIBRATED, load_bert, new_qformer
from llm_stage.qformer_folder import load_qformer
from llm_stage.qformer_text import QFormerTokenizer, clean_caption, clean_question
from llm_stage.train_qformer import main
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.records import read_jsonl
from mmkit.run import Run

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 30),
    "blue": (30, 30, 220),
    "white": (250, 250, 250),
    "black": (9, 9, 9),
    "grey": (128,) * 3,
}
NETWORK = {
    "width": 32,
    "layers": 2,
    "heads": 4,
    "feed_forward": 48,
    "queries": 4,
    "cross_attention_every": 1,
    "joint_width": 16,
    "dropout": 0.0,
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders of different width, and pictures of walls with captions."""
    folder = tmp_path_factory.mktemp("qformer")
    torch.manual_seed(1)
    for name, width in (("encoder", 48), ("wide", 60)):
        args = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 3, "global_pool": "token"}
        spec = ImageSpec(32).to_dict()
        VisionEncoder(VisionEncoderConfig(architecture="eva02_tiny_patch14_224", model_args=args, image_spec=spec)).save_pretrained(
            folder / name
        )
    (folder / "images").mkdir()
    rows = []
    for number in range(24):
        colour = list(COLOURS)[number % 6]
        noise = np.random.default_rng(number).integers(-20, 20, (40, 36, 3))
        Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)).save(folder / "images" / f"{number:02d}.png")
        rows.append({"image": f"{number:02d}.png", "caption": [f"A {colour} wall, number {number}.", f"wall {number} is {colour}"]})
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder


def flags(material: Path, out: Path, *more: str) -> list[str]:
    shape = [word for key, value in NETWORK.items() for word in (f"--network.{key}", str(value))]
    data = [
        "--encoder",
        str(material / "encoder"),
        "--data.source",
        str(material / "pairs.json"),
        "--data.image_root",
        str(material / "images"),
    ]
    run = [
        "--run.steps",
        "6",
        "--run.micro_batch_size",
        "8",
        "--lr",
        "2e-3",
        "--warmup",
        "2",
        "--run.log_every",
        "1",
        "--run.save_every",
        "2",
    ]
    return [*data, *shape, *run, "--output_dir", str(out), *more]


def losses(folder: Path) -> list[list[float]]:
    return [[row[name] for name in ("itc", "itm", "itg") if name in row] for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(material: Path) -> Path:
    return main(flags(material, material / "trained"))


def test_a_stopped_run_goes_on_with_the_same_losses(material: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Run.backward

    def break_down(self: Run, loss: Any, **terms: Any) -> None:
        if self.step == 3:
            raise RuntimeError("the lights go out")
        backward(self, loss, **terms)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "backward", break_down)
        with pytest.raises(RuntimeError):
            main(flags(material, tmp_path / "run"))
    main(flags(material, tmp_path / "run", "--resume"))
    assert losses(tmp_path / "run") == losses(trained)
    whole, again = (load_file(folder / "model" / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("zero, more", [(0, ()), (2, ()), (0, ("--itm_from", "0.5"))])
def test_two_processes_equal_one(
    zero: int, more: tuple[str, ...], material: Path, trained: Path, tmp_path: Path, child_environment: dict[str, str], free_port: int
) -> None:
    words = flags(material, tmp_path / "two", "--run.micro_batch_size", "4", *more)
    if zero:
        words += ["--run.deepspeed", json.dumps({"zero_optimization": {"stage": zero}})]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port)]
    done = subprocess.run(
        [*command, "-m", "llm_stage.train_qformer", *words], env=child_environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = main(flags(material, tmp_path / "one", *more)) if more else trained
    for one, two in zip(losses(whole), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_the_folder_loads_whole_and_another_encoder_in_it_is_refused(material: Path, trained: Path, tmp_path: Path) -> None:
    parts = load_qformer(trained / "model")
    assert parts.card.mode == "train"
    assert parts.tokenizer.decode(parts.tokenizer(["a red wall"])[0]) == ["a red wall"]
    own, kept = load_file(material / "encoder" / "model.safetensors"), load_file(trained / "model" / "encoder" / "model.safetensors")
    assert all(torch.equal(own[key], kept[key]) for key in own)
    moved = tmp_path / "moved"
    shutil.copytree(trained / "model", moved)
    changed = {key: tensor + 1e-3 if key.endswith("norm.weight") else tensor for key, tensor in kept.items()}
    save_file(changed, moved / "encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="is not the encoder that this Q-Former was made with"):
        load_qformer(moved)
    with pytest.raises(ConfigError, match=r"no Q-Former folder: it has no qformer\.json"):
        load_qformer(material / "encoder")


def test_calibration_trains_keys_values_and_norm_alone(material: Path, trained: Path, tmp_path: Path) -> None:
    more = ["--encoder", str(material / "wide"), "--pretrained", str(trained / "model"), "--calibrate", "true", "--run.steps", "2"]
    folder = main(flags(material, tmp_path / "run", *more))
    before, after = (load_file(path / "model" / "model.safetensors") for path in (trained, folder))
    for key, tensor in after.items():
        if any(fnmatchcase(key, pattern) for pattern in CALIBRATED):
            assert tensor.shape[-1] in (60, 32)
        else:
            assert torch.equal(tensor, before[key]), key
    assert load_qformer(folder / "model").card.mode == "calibrate"
    with pytest.raises(ConfigError, match="reads tokens of width 48, the encoder gives 60"):
        main(flags(material, tmp_path / "kept", *more, "--renew", "false"))
    assert not (tmp_path / "kept").exists()


def test_matching_may_begin_later(material: Path, trained: Path, tmp_path: Path) -> None:
    late = main(flags(material, tmp_path / "late", "--itm_from", "0.5"))
    assert [len(row) for row in losses(late)] == [2, 2, 2, 3, 3, 3]
    assert losses(late)[0] == [losses(trained)[0][0], losses(trained)[0][2]]
    assert "itm_head.weight" in load_file(late / "model" / "model.safetensors")


WHOLE = ("--data.scale", "[1.0, 1.0]")


def test_kept_features_train_the_same_and_the_encoder_runs_once_a_picture(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = main(flags(material, tmp_path / "plain", *WHOLE))
    keep = ("--data.feature_cache", str(tmp_path / "features"))
    first = main(flags(material, tmp_path / "first", *WHOLE, *keep))
    assert losses(first) == losses(plain)
    shown: list[int] = []
    encode = pair_features.encoder_features
    monkeypatch.setattr(
        pair_features, "encoder_features", lambda encoder, images, layer: shown.append(len(images)) or encode(encoder, images, layer)
    )
    again = main(flags(material, tmp_path / "again", *WHOLE, *keep))
    assert losses(again) == losses(plain)
    assert shown == [1]  # the blank image that tells their shape
    other = main(flags(material, tmp_path / "other", *WHOLE, *keep, "--encoder", str(material / "wide"), "--run.steps", "1"))
    assert shown == [1, 1, 8, 8, 8]
    assert losses(other)[0] != losses(plain)[0]
    shard = next((tmp_path / "features").glob("*/*.features"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match="is truncated"):
        main(flags(material, tmp_path / "damaged", *WHOLE, *keep))
    assert not (tmp_path / "damaged").exists()


def test_a_picture_that_cannot_be_kept_is_named_or_left_out(material: Path, tmp_path: Path) -> None:
    shutil.copytree(material / "images", tmp_path / "images")
    (tmp_path / "images" / "05.png").write_bytes(b"no picture")
    keep = (*WHOLE, "--data.feature_cache", str(tmp_path / "features"), "--data.image_root", str(tmp_path / "images"))
    with pytest.raises(DataError, match=r"05\.png(.|\n)*on_bad_sample skip"):
        main(flags(material, tmp_path / "run", *keep))
    run = main(flags(material, tmp_path / "skip", *keep, "--data.on_bad_sample", "skip"))
    assert [Path(row["pair"]).name for row in read_jsonl(run / "bad_samples.jsonl")] == ["05.png"]


@pytest.fixture(scope="module")
def walls(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Q-Former that has seen the walls sixty times."""
    folder = tmp_path_factory.mktemp("walls") / "run"
    return main(flags(material, folder, "--run.steps", "60", "--run.micro_batch_size", "12", "--lr", "5e-3")) / "model"


def sought(model: Path, material: Path, out: Path, *more: str) -> list[str]:
    """Flags of a retrieval of the walls."""
    return [
        "--model",
        str(model),
        "--captions",
        str(material / "pairs.json"),
        "--images",
        str(material / "images"),
        "--out",
        str(out),
        *more,
    ]


def test_retrieval_learns_what_the_captions_say(material: Path, walls: Path, tmp_path: Path) -> None:
    """Sixty steps tell six colours apart; the numbers cannot be seen. With other pictures nothing is left."""
    found = {}
    for name, more in (("own", []), ("shuffled", ["--shuffle_images", "true"])):
        out = eval_retrieval.main(sought(walls, material, tmp_path / name, "--k", "6", *more))
        found[name] = json.loads((out / "summary.json").read_text())
        assert found[name]["n"] == 24 + 48
        assert {row["kind"] for row in read_jsonl(out / "answers.jsonl")} == {"text_retrieval", "image_retrieval"}
    own, shuffled = (found[name]["metrics"]["itc/image_retrieval_recall@10"]["value"] for name in ("own", "shuffled"))
    assert own > 70  # chance is 10 of 24, 42 %; one who knows the colours has its four pictures first
    assert shuffled < 42
    with pytest.raises(DataError, match="k was 6, is 7"):
        eval_retrieval.main(sought(walls, material, tmp_path / "own", "--k", "7", "--resume"))


@pytest.mark.slow
def test_a_retrieval_that_was_killed_goes_on_and_two_processes_find_what_one_finds(
    material: Path, walls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child_environment: dict[str, str]
) -> None:
    whole = eval_retrieval.main(sought(walls, material, tmp_path / "whole", "--k", "6"))
    match_texts, images = eval_retrieval.match_texts, iter(range(10))

    def killed(*args: Any) -> Any:
        if next(images, None) is None:
            raise KeyboardInterrupt
        return match_texts(*args)

    monkeypatch.setattr(eval_retrieval, "match_texts", killed)
    with pytest.raises(KeyboardInterrupt):
        eval_retrieval.main(sought(walls, material, tmp_path / "killed", "--k", "6"))
    assert len(read_jsonl(tmp_path / "killed" / "matches.jsonl")) == 10
    images = iter(range(14))  # 24 in all: those that were matched are not matched again
    resumed = eval_retrieval.main(sought(walls, material, tmp_path / "killed", "--k", "6", "--resume"))
    assert sorted(path.name for path in resumed.iterdir()) == ["answers.jsonl", "manifest.json", "summary.json"]
    assert (resumed / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()
    script = Path(eval_retrieval.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run([*command, *sought(walls, material, tmp_path / "two", "--k", "6")], check=True, env=child_environment, timeout=300)
    for one, two in zip(read_jsonl(whole / "answers.jsonl"), read_jsonl(tmp_path / "two" / "answers.jsonl"), strict=True):
        assert {**one, "answer": ""} == {**two, "answer": ""}  # of two equal pictures either may stand first


def test_a_q_former_begins_as_a_bert(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40}
    BertForMaskedLM(BertConfig(vocab_size=50, **shape)).save_pretrained(tmp_path / "bert")
    config = QFormerConfig(24, 32, 2, 4, 48, 4, 1, 51, 40, 16, 0.0, 0, 1, 2, 50)
    model, bert = new_qformer(config, 0, str(tmp_path / "bert")), BertForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    ids = torch.tensor([[1, 7, 8, 9, 2]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        ours = model.eval().words(model.text(ids, mask))
        types = bert.bert.embeddings.token_type_embeddings.weight
        types.zero_()  # a Q-Former has no segments
        theirs = bert(ids, mask).logits
    torch.testing.assert_close(ours[..., :50], theirs, rtol=1e-4, atol=1e-5)
    layer = model.qformer.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    with pytest.raises(ConfigError, match=r"does not fit this Q-Former: .* is \[\d+, 32\] there"):
        load_bert(new_qformer(QFormerConfig(24, 48, 2, 4, 48, 4, 1, 51, 40, 16, 0.0, 0, 1, 2, 50), 0), str(tmp_path / "bert"))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--run.micro_batch_size", "1"], "ITM needs another pair to be wrong about"),
        (["--encoder", ""], "--encoder is missing"),
        (["--feature_layer", "-4"], "has 2 blocks, so -3 to 2 is right"),
        (["--calibrate", "true"], "needs --pretrained"),
        (["--weights", "[0, 1, 1]"], "ITC's above 0"),
        (["--itm_from", "0.5", "--weights", "[1, 0, 1]"], "itm_from is 0.5"),
        (["--data.source", "nowhere.json"], "no such file"),
        (["--val_captions", "a.json"], "go together"),
        (["--data.feature_cache", "features"], "keeps what the encoder makes of a whole picture"),
        (["--data.feature_cache", "features", *WHOLE, "--data.source", "minidata"], "is for picture files"),
    ],
)
def test_what_cannot_be_meant_is_said_and_nothing_is_written(more: list[str], message: str, material: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        main(flags(material, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_caption_without_words_is_named(material: Path, tmp_path: Path) -> None:
    rows = json.loads((material / "pairs.json").read_text())
    rows[3]["caption"] = ["  "]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"pairs\.json, record 3: 'image' and 'caption'"):
        main(flags(material, tmp_path / "run", "--data.source", str(tmp_path / "pairs.json")))
    with pytest.raises(DataError, match="text 1 of 2 has no word in it"):
        QFormerTokenizer.learn(["a wall"])(["a wall", " "])


def test_captions_and_questions_are_made_plain_as_lavis_does() -> None:
    assert clean_caption('A "red" Wall, no. 3 (big)!') == "a red wall, no 3 big"
    assert clean_question("What's #1: it?") == "what's 1 it?"
    assert clean_caption("w " * 60) == " ".join(["w"] * 50)


def test_held_out_checks_and_shares_of_weights_are_refused_together(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    shares = ["--run.deepspeed", json.dumps({"zero_optimization": {"stage": 3}})]
    watched = ["--val_captions", str(material / "pairs.json"), "--val_images", str(material / "images")]
    with pytest.raises(ConfigError, match="ZeRO-3 holds shares of them"):
        main(flags(material, tmp_path / "run", *shares, *watched))
