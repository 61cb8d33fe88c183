"""The zero-shot suite: every benchmark as people have it on disk, what is wrong with a folder, means, ranks, agreement with clip_benchmark."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from encoders import eval_zeroshot, eval_zeroshot_retrieval
from encoders.catalog import load_encoder
from encoders.image_batches import batches
from encoders.labelled_shards import captioned_shards, has_shards, labelled_shards
from encoders.text import MINI_CLIP
from encoders.zeroshot import TEMPLATES, load_templates
from encoders.zeroshot_layouts import LabelledImages, synsets
from encoders.zeroshot_sets import IMAGENET_SIX, SETS, choose, facts, own_folders, place_of
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.evaluation import gather_parts, mean_of_shares, share_metric
from mmkit.images import open_image
from mmkit.minidata import names, world
from mmkit.records import read_jsonl

PIXEL = b"\x89PNG\r\n\x1a\n"  # a finder looks at names only


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PIXEL)
    return root


# ---- every benchmark in its own layout -----------------------------------------------------------------------------------------------


def objectnet_mappings(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "backpack": "Backpack"}
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Alarm clock": "analog clock", "Backpack": "backpack, back pack"}))


def make_objectnet(root: Path) -> None:
    objectnet_mappings(root / "mappings")
    touch(root, "images/air_freshener/a.png", "images/alarm_clock/b.png", "images/backpack/c.png")


def make_cifar(root: Path, folder: str, test: str, meta: str, labels: str, label_names: str, classes: int) -> None:
    (root / folder).mkdir(parents=True)
    rows = np.arange(classes * 3072, dtype=np.int64).reshape(classes, 3072) % 251
    batch = {"data": rows.astype(np.uint8), labels: list(range(classes))}
    (root / folder / test).write_bytes(pickle.dumps(batch, protocol=2))
    known = facts()["names"]["cifar10"] if classes == 10 else [f"name_{index}" for index in range(classes)]
    (root / folder / meta).write_bytes(pickle.dumps({label_names: known}, protocol=2))


def make_gtsrb(root: Path) -> None:
    touch(root, "GTSRB/Final_Test/Images/00000.ppm", "GTSRB/Final_Test/Images/00001.ppm")
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    (root / "GT-final_test.csv").write_text(f"{head}\n00000.ppm;53;54;6;5;48;49;16\n00001.ppm;42;45;5;5;36;40;1\n")


# Benchmark -> how its files lie, and (path, class name) of some of its images.
LAYOUTS: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "zeroshot": (lambda root: touch(root, "cat/1.png", "dog/a/2.jpg"), {"cat/1.png": "cat", "dog/a/2.jpg": "dog"}),
    "mini_zeroshot": (lambda root: touch(root, "cat/1.png"), {"cat/1.png": "cat"}),
    "imagenet": (
        lambda root: touch(root, "val/n01440764/a.JPEG", "val/n15075141/b.JPEG"),
        {"n01440764/a.JPEG": "tench", "n15075141/b.JPEG": "toilet paper"},
    ),
    "imagenet_a": (
        lambda root: touch(root, *(f"{wnid}/x.jpg" for wnid in synsets("imagenet_a"))),
        {"n01498041/x.jpg": "stingray", "n12267677/x.jpg": "acorn"},
    ),
    "imagenet_r": (lambda root: touch(root, "imagenet-r/n01443537/a.jpg"), {"n01443537/a.jpg": "goldfish"}),
    "imagenet_v2": (lambda root: touch(root, "2/a.jpeg", "10/b.jpeg"), {"2/a.jpeg": "great white shark", "10/b.jpeg": "brambling"}),
    "imagenet_sketch": (lambda root: touch(root, "sketch/n01440764/s.JPEG"), {"n01440764/s.JPEG": "tench"}),
    "objectnet": (make_objectnet, {"alarm_clock/b.png": "alarm clock", "backpack/c.png": "backpack"}),
    "eurosat": (
        lambda root: touch(root, "2750/AnnualCrop/1.jpg", "2750/SeaLake/1.jpg"),
        {"AnnualCrop/1.jpg": "annual crop land", "SeaLake/1.jpg": "lake or sea"},
    ),
    "cifar10": (
        lambda root: make_cifar(root, "cifar-10-batches-py", "test_batch", "batches.meta", "labels", "label_names", 10),
        {"test_batch/00000": "airplane", "test_batch/00009": "truck"},
    ),
    "cifar100": (
        lambda root: make_cifar(root, "cifar-100-python", "test", "meta", "fine_labels", "fine_label_names", 100),
        {"test/00042": "name 42"},
    ),
    "gtsrb": (make_gtsrb, {"00000.ppm": "red and white circle no truck entry", "00001.ppm": "red and white circle 30 kph speed limit"}),
    "caltech101": (
        lambda root: touch(root, "101_ObjectCategories/Faces/image_0001.jpg", "101_ObjectCategories/yin_yang/image_0001.jpg"),
        {"Faces/image_0001.jpg": "off-center face", "yin_yang/image_0001.jpg": "yin and yang symbol"},
    ),
}  # fmt: skip


def labelled(data: LabelledImages) -> dict[str, str]:
    return {path: data.names[label] for path, label in zip(data.paths, data.labels, strict=True)}


@pytest.mark.parametrize("name", SETS)
def test_every_benchmark_reads_its_own_layout(name: str, tmp_path: Path) -> None:
    make, expected = LAYOUTS[name]
    make(tmp_path)
    found = SETS[name].find(tmp_path, True)
    assert expected.items() <= labelled(found).items()
    assert SETS[name].prompts in {"", *TEMPLATES}
    if found.pixels is None:
        assert all((found.root / path).is_file() for path in found.paths)


def test_imagenet_a_and_r_are_chosen_among_their_own_200_names(tmp_path: Path) -> None:
    order = {wnid: index for index, wnid in enumerate(synsets())}
    assert list(synsets()) == sorted(synsets())
    assert len(IMAGENET_CLASSNAMES) == len(order) == 1000
    for name in ("imagenet_a", "imagenet_r"):
        LAYOUTS[name][0](tmp_path / name)
        found = SETS[name].find(tmp_path / name, True)
        assert len(found.names) == 200
        assert list(found.names) == [IMAGENET_CLASSNAMES[order[wnid]] for wnid in synsets(name)]
    assert SETS["imagenet_a"].find(tmp_path / "imagenet_a", False).notes == ()  # all 200 folders are there


def test_kaggles_copy_of_imagenet_is_read_by_its_solution_file(tmp_path: Path) -> None:
    touch(tmp_path, "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000002.JPEG", "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG")
    rows = "ImageId,PredictionString\nILSVRC2012_val_00000002,n01440764 1 2 3 4\nILSVRC2012_val_00000001,n15075141 85 1 499 272 \n"
    (tmp_path / "LOC_val_solution.csv").write_text(rows)
    found = SETS["imagenet"].find(tmp_path, False)
    assert labelled(found) == {"ILSVRC2012_val_00000001.JPEG": "toilet paper", "ILSVRC2012_val_00000002.JPEG": "tench"}


def test_cifars_pixels_are_the_same_in_both_of_its_forms(tmp_path: Path) -> None:
    LAYOUTS["cifar10"][0](tmp_path / "py")
    rows = (np.arange(30720).reshape(10, 3072) % 251).astype(np.uint8)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "test_batch.bin").write_bytes(np.concatenate([np.arange(10, dtype=np.uint8)[:, None], rows], axis=1).tobytes())
    (tmp_path / "bin" / "batches.meta.txt").write_text("\n".join(facts()["names"]["cifar10"]) + "\n")
    python, binary = (SETS["cifar10"].find(tmp_path / form, False) for form in ("py", "bin"))
    assert (python.labels, python.names) == (binary.labels, binary.names)
    first, second = (np.asarray(open_image(data.source(data.paths[3]))) for data in (python, binary))
    assert np.array_equal(first, second)
    assert first[0, 1].tolist() == [rows[3, 1], rows[3, 1025], rows[3, 2049]]  # red, green, blue planes


def test_a_pickle_that_calls_a_function_is_refused(tmp_path: Path) -> None:
    LAYOUTS["cifar10"][0](tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(DataError, match=r"os\.system"):
        SETS["cifar10"].find(tmp_path, False)


@pytest.mark.parametrize(
    "name, prepare, complaint",
    [
        ("zeroshot", lambda root: (touch(root, "cat/1.png").joinpath("dog").mkdir(),), "1 of 2 class folders are empty: dog"),
        ("imagenet_r", lambda root: touch(root, "n01443537/a.jpg"), "199 of 200 class folders are missing"),
        ("imagenet_r", lambda root: touch(root, "n01440764/a.jpg"), "but not of ImageNet-R"),
        ("imagenet", lambda root: touch(root, "cats/a.jpg"), "it holds the folders cats"),
        ("imagenet_v2", lambda root: touch(root, "1/a.jpg", "1000/a.jpg"), "'1000' is none of them"),
        ("objectnet", lambda root: touch(root, "images/alarm_clock/a.png"), "folder_to_objectnet_label"),
        ("eurosat", lambda root: touch(root, "Forest/a.jpg", "Forrest/a.jpg"), "'Forrest' is no class folder"),
        ("gtsrb", lambda root: (make_gtsrb(root), (root / "GTSRB/Final_Test/Images/00001.ppm").unlink()), "1 of 2 listed images are missing"),
        ("gtsrb", lambda root: (make_gtsrb(root), (root / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;43\n")), "ClassId '43'"),
        ("caltech101", lambda root: None, "BACKGROUND_Google"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_named(name: str, prepare: Callable[[Path], object], complaint: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(DataError, match=complaint):
        SETS[name].find(tmp_path, False)


def test_class_names_that_occur_twice_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "images", "cat/1.png", "dog/1.png")
    lines = tmp_path / "names.txt"
    lines.write_text("dog\nbird\ncat\ndog\n")
    with pytest.raises(DataError, match="'dog' stands in line 1 and in line 4"):
        own_folders(tmp_path / "images", False, str(lines))
    table = tmp_path / "names.json"
    table.write_text('{"cat": "a", "dog": "b", "cat": "c"}')
    with pytest.raises(DataError, match="'cat' occurs twice"):
        own_folders(tmp_path / "images", False, str(table))


def test_an_unknown_benchmark_names_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(NameNotFound, match="imagenet_sketch"):
        choose("imagenet_sketches")
    with pytest.raises(NameNotFound, match="mmkit eval retrieval"):
        choose("coco_retrieval")
    with pytest.raises(ConfigError, match="twice"):
        choose("imagenet_six,imagenet_a")
    with pytest.raises(NameNotFound, match="flickr30k_retrieval"):
        eval_zeroshot_retrieval.main(
            ["--encoder", "e", "--captions", "c", "--images", "i", "--out", "o", "--benchmark", "flickr_retrieval"]
        )
    with pytest.raises(DataError, match=r"ObjectNet, 113 classes, in it; it would be called objectnet-1\.0"):
        place_of("objectnet", tmp_path, alone=False)


def test_a_benchmark_in_shards_answers_as_the_same_one_in_folders(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    names, root = sorted(path.name for path in pictures.iterdir()), tmp_path / "shards"
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(names) + "\n")
    for label, name in enumerate(names):
        members = {f"s{n}.{kind}": body for n in range(2) for kind, body in (
            ("png", (pictures / name / f"{n}.png").read_bytes()), ("cls", str(label).encode()), ("txt", f"a {name}\n{name} {n}".encode())
        )}  # fmt: skip
        with tarfile.open(root / "test" / f"{label}.tar", "w") as tar:
            for member, body in members.items():
                about = tarfile.TarInfo(member)
                about.size = len(body)
                tar.addfile(about, io.BytesIO(body))
    assert has_shards(root)
    assert has_shards(root / "test")
    assert not has_shards(pictures)
    data, folders = labelled_shards(root), own_folders(pictures, False)
    assert (data.names, data.labels) == (folders.names, folders.labels)
    for mine, theirs in zip(data.paths, folders.paths, strict=True):
        assert open_image(data.source(mine)).tobytes() == open_image(folders.source(theirs)).tobytes()
    captions = captioned_shards(root, "test", first=1)
    assert captions.captions[:3] == ("a bicycle", "a bicycle", "a cat")
    assert captions.owner == tuple(range(12))
    assert captioned_shards(root, "test").owner[:4] == (0, 0, 1, 1)
    out = eval_zeroshot.main(["--encoder", "mini-clip", "--images", str(root), "--out", str(tmp_path / "out")])
    assert json.loads((out / "summary.json").read_text())["n"] == 12
    (root / "classnames.txt").write_text("cat\n")
    with pytest.raises(DataError, match="says '1'; a number from 0 to 0"):
        labelled_shards(root)
    (root / "classnames.txt").unlink()
    with pytest.raises(DataError, match="--classnames"):
        labelled_shards(root)


# ---- figures -------------------------------------------------------------------------------------------------------------------------


def test_the_mean_counts_each_benchmark_alike_and_its_interval_shrinks() -> None:
    mean = mean_of_shares([(0.8, 50_000), (0.4, 100)])
    assert mean["value"] == pytest.approx(60)
    low, high = mean["ci95"]
    alone = share_metric(40, 100)["ci95"]
    assert (high - low) == pytest.approx((alone[1] - alone[0]) / 2, rel=0.05)  # the large set adds next to nothing
    assert mean_of_shares([(1.0, 10), (1.0, 10)])["ci95"][0] < 100


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of two pictures."""
    root = tmp_path_factory.mktemp("pictures")
    for position, name in enumerate(("bicycle", "cat", "dog", "pizza", "rocket", "umbrella")):
        (root / name).mkdir()
        for number in range(2):
            scene = world.sample_scene(np.random.default_rng((position, number)), [name], 1)
            Image.fromarray(world.render(scene)).save(root / name / f"{number}.png")
    return root


def test_several_benchmarks_get_a_folder_each_and_a_mean(pictures: Path, tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    crops = {"AnnualCrop": "cat", "Forest": "dog", "River": "pizza"}
    for folder, name in crops.items():
        (sets / "eurosat" / folder).mkdir(parents=True)
        (sets / "eurosat" / folder / "0.png").symlink_to(pictures / name / "0.png")
    (sets / "imagenet-sketch" / "n01440764").mkdir(parents=True)
    (sets / "imagenet-sketch" / "n01440764" / "0.png").symlink_to(pictures / "cat" / "0.png")
    flags = [
        "--encoder",
        "mini-clip",
        "--images",
        str(sets),
        "--benchmark",
        "eurosat,imagenet_sketch",
        "--prompts",
        "name",
        "--partial",
        "true",
    ]
    out = eval_zeroshot.main([*flags, "--out", str(tmp_path / "out")])
    mean, first, second = (json.loads((out / name / "summary.json").read_text()) for name in ("mean", "eurosat", "imagenet_sketch"))
    expected = (first["metrics"]["top5"]["value"] + second["metrics"]["top5"]["value"]) / 2
    assert mean["metrics"]["top5"]["value"] == pytest.approx(expected, abs=1e-3)
    assert mean["metrics"]["top1/eurosat"] == first["metrics"]["top1"]
    assert (first["protocol"]["classes"], second["protocol"]["classes"]) == (10, 1000)
    assert any("999 of 1000 class folders are missing" in note for note in second["protocol"]["notes"])
    assert any("2 class names occur twice" in note for note in second["protocol"]["notes"])
    assert len(IMAGENET_SIX) == 6


# ---- clip_benchmark ------------------------------------------------------------------------------------------------------------------


def test_names_and_prompts_are_those_of_clip_benchmark() -> None:
    package = pytest.importorskip("clip_benchmark", reason="clip_benchmark is not installed (the extra `dev` has it)")
    folder = Path(package.__file__).parent / "datasets"
    theirs = json.loads((folder / "en_classnames.json").read_text())
    prompts = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    for name in ("eurosat", "gtsrb", "caltech101"):
        ours = facts()["names"][name]
        assert theirs[name] == list(ours.values() if isinstance(ours, dict) else ours)
    for ours, name in (("openai", "imagenet1k"), ("cifar", "cifar10"), ("cifar", "cifar100"), ("eurosat", "eurosat"), ("gtsrb", "gtsrb"),
                       ("caltech101", "caltech101")):  # fmt: skip
        assert [line.replace("{c}", "a {x}") for line in prompts[name]] == [template("a {x}") for template in load_templates(ours)]


def test_clip_benchmark_agrees_on_the_embedded_drawings(pictures: Path, tmp_path: Path) -> None:
    classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason="clip_benchmark is not installed")
    import open_clip

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a picture of a {}\n{}\nthere is a {}\n")
    listed = tmp_path / "names.txt"
    candidates = names.object_names("trained")[:40]
    candidates = sorted({*candidates, *(path.name for path in pictures.iterdir())})
    listed.write_text("\n".join(candidates))
    flags = ["--encoder", "mini-clip", "--images", str(pictures), "--classnames", str(listed), "--prompts", str(prompts)]
    out = eval_zeroshot.main([*flags, "--out", str(tmp_path / "out")])
    ours = json.loads((out / "summary.json").read_text())["metrics"]

    model = open_clip.create_model(f"local-dir:{MINI_CLIP}").eval()
    data, spec = own_folders(pictures, False, str(listed)), load_encoder("mini-clip").spec
    images = torch.cat([images for _, images, _ in batches(data.source, data.paths, spec, 64)])

    loader = [(images, torch.tensor(data.labels))]
    templates = [line.replace("{}", "{c}") for line in prompts.read_text().splitlines()]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{MINI_CLIP}")
    # Its `evaluate` ends in a conversion that numpy 2.4 refuses; these are the two steps it takes before.
    classifier = classification.zero_shot_classifier(model, tokenizer, candidates, templates, "cpu", amp=False)
    logits, target = classification.run_classification(model, classifier, loader, "cpu", amp=False)
    hits = logits.topk(5).indices == target[:, None]
    assert 0 < hits[:, 0].double().mean() < 1  # a set on which all are right could not tell much
    assert ours["top1"]["value"] == pytest.approx(100 * hits[:, 0].double().mean().item(), abs=1e-3)
    assert ours["top5"]["value"] == pytest.approx(100 * hits.any(dim=1).double().mean().item(), abs=1e-3)
    cosines = torch.tensor([row["cosine"] for row in read_jsonl(out / "answers.jsonl")])
    torch.testing.assert_close(100 * cosines, logits.topk(5).values, atol=0.006, rtol=0)  # answers are rounded to 4 digits


# ---- several processes ---------------------------------------------------------------------------------------------------------------


def without_time(path: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "cosine")} for row in read_jsonl(path)]


def test_what_killed_processes_left_is_joined(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"question_id": "a", "top1": 1}\n')
    (tmp_path / "answers.rank0000.jsonl").write_text('{"question_id": "b", "top1": 0}\n{"question_id": "c", "missing": "?"}\n')
    (tmp_path / "answers.rank0001.jsonl").write_text('{"question_id": "d", "top1": 1}\n{"question_id": "e", "to')
    gather_parts(tmp_path)
    assert [row["question_id"] for row in read_jsonl(tmp_path / "answers.jsonl")] == ["a", "b", "d"]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.slow
def test_two_processes_answer_as_one(pictures: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    captions = [{"image": f"{name}/{n}.png", "caption": [f"a {name}", f"{name} number {n}"]} for name in ("cat", "dog") for n in range(2)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))

    def flags(out: Path) -> tuple[list[str], list[str]]:
        common = ["--encoder", "mini-clip", "--images", str(pictures), "--batch_size", "2"]
        return [*common, "--out", str(out / "names")], [*common, "--captions", str(tmp_path / "captions.json"), "--out", str(out / "ret")]

    script = tmp_path / "both.py"
    first, second = flags(tmp_path / "two")
    script.write_text(
        "from encoders import eval_zeroshot, eval_zeroshot_retrieval\n"
        f"eval_zeroshot.main({first!r})\neval_zeroshot_retrieval.IMAGES_AT_ONCE = 1\neval_zeroshot_retrieval.main({second!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = flags(tmp_path / "one")
    eval_zeroshot.main(first)
    eval_zeroshot_retrieval.main(second)
    for name in ("names", "ret"):
        one, two = (tmp_path / count / name for count in ("one", "two"))
        assert without_time(one / "answers.jsonl") == without_time(two / "answers.jsonl")
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
        assert summaries[0]["metrics"] == summaries[1]["metrics"]
        assert summaries[1]["protocol"]["processes"] == 2
        assert sorted(path.name for path in two.iterdir()) == ["answers.jsonl", "manifest.json", "summary.json"]
