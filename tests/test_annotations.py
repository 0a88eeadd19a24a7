"""Labels and conditions, and the metadata files of folders."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from data_files import FACES, ROWS, folder_of, manifests, saved_rows, write_metadata

from diffusers_hdit.data import Buckets, load_images, make_loader


pytestmark = pytest.mark.usefixtures("own_cache")


# --- Conditions, and what metadata files say


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("inner", [False, True])
def test_metadata_of_a_folder(tmp_path, kind, inner):
    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder, kind, inner=inner)
    dataset = load_images(
        train_data_dir=folder, resolution=12, label_column="flower", condition_columns=["place", "temperature"]
    )
    assert dataset.id2label == {0: "aster", 1: "rose"} and [dataset[i]["label"] for i in range(3)] == [1, 0, 1]
    columns = dataset.condition_columns
    assert columns["names"] == ["place[0]", "place[1]", "temperature"]
    values = np.array([[1, 5, 10], [2, 7, 20], [3, 3.5, 60]])
    assert np.allclose(columns["mean"], values.mean(0)) and np.allclose(columns["std"], values.std(0))
    batch = next(iter(make_loader(dataset, batch_size=3, seed=0)))
    assert batch["mapping_cond"].shape == (3, 3) and batch["mapping_cond"].dtype == torch.float32
    expected = (values - values.mean(0)) / values.std(0)
    assert np.allclose(batch["mapping_cond"], expected[batch["index"]], atol=1e-6)
    assert "mapping_cond" not in load_images(train_data_dir=folder, resolution=12)[0]


def test_the_pipeline_takes_the_conditions_by_name(tmp_path, make_model):
    from diffusers import EDMDPMSolverMultistepScheduler

    from diffusers_hdit import HDiTPipeline

    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder)
    dataset = load_images(train_data_dir=folder, resolution=12, condition_columns=["temperature", "place"])
    pipeline = HDiTPipeline(
        make_model(mapping_cond_dim=3), EDMDPMSolverMultistepScheduler(), condition_columns=dataset.condition_columns
    )
    encoded = pipeline.encode_mapping_cond({"temperature": [10.0, 60], "place[0]": [1.0, 3], "place[1]": [5.0, 3.5]})
    assert torch.allclose(encoded, torch.stack([dataset[0]["mapping_cond"], dataset[2]["mapping_cond"]]), atol=1e-6)


def test_given_statistics(tmp_path):
    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder)
    options = {"train_data_dir": folder, "resolution": 12, "condition_columns": ["temperature"]}
    given = {"mean": [20], "std": [10]}
    dataset = load_images(**options, condition_statistics=given)
    assert [dataset[i]["mapping_cond"].item() for i in range(3)] == [-1, 0, 4]
    again = load_images(**options, condition_statistics=dataset.condition_columns)
    assert again.condition_columns == {"names": ["temperature"], "mean": [20.0], "std": [10.0]}
    for wrong in (
        {"mean": [1, 2], "std": [1, 2]},
        {"mean": [1], "std": [0]},
        {"mean": [1]},
        {**given, "names": ["x"]},
    ):
        with pytest.raises(ValueError, match="condition_statistics"):
            load_images(**options, condition_statistics=wrong)
    with pytest.raises(ValueError, match="condition_statistics need condition_columns"):
        load_images(train_data_dir=folder, resolution=12, condition_statistics=given)
    with pytest.raises(ValueError, match="list of different names; got 'temperature'"):
        load_images(train_data_dir=folder, resolution=12, condition_columns="temperature")


@pytest.mark.parametrize(
    "column, rows, message",
    [
        ("temperature", {"b/c.png": ("nan", "x", [1, 2])}, r"'temperature' of .*: 1 of 3 rows have no finite .*'b/c.png' \('nan'\)"),
        ("temperature", {"b/c.png": ("", "x", [1, 2])}, r"'temperature': 1 of 3 images .* no such entry .*'b/c.png'; its"),
        ("flower", {}, r"'flower' of .*: 3 of 3 rows have no finite number .*'a.png' \('rose'\)"),
        ("temperature", {name: (5, "x", [1, 2]) for name in ROWS}, "'temperature' is 5 in all 3 images: leave it out"),
        ("place", {"a.png": (1, "x", [1])}, r"'place' of .* has vectors of 1 to 2 numbers \(the shortest: 'a.png'\)"),
        ("place", {"a.png": (1, "x", [1, None])}, r"'place' of .*: 1 of 3 rows .*'a.png' \("),
        ("pressure", {}, r"'pressure': 3 of 3 images .*; its columns: \['flower', 'place', 'temperature'\]"),
    ],
)  # fmt: skip
def test_bad_conditions(tmp_path, column, rows, message):
    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder, rows={**ROWS, **rows})
    with pytest.raises(ValueError, match=message):
        load_images(train_data_dir=folder, resolution=12, condition_columns=[column])


@pytest.mark.parametrize(
    "options",
    [{"condition_columns": ["flower"]}, {"buckets": Buckets(64, 64)}, {"cache_images": "x"}, {"label_column": "x"}],
)
def test_what_can_be_refused_without_decoding_is(tmp_path, options):
    folder = folder_of(tmp_path, *ROWS)
    write_metadata(folder)
    with pytest.raises(ValueError):
        load_images(train_data_dir=folder, resolution=12, **options)
    assert not manifests(tmp_path)


def test_bad_metadata(tmp_path):
    folder = folder_of(tmp_path, *ROWS)
    options = {"train_data_dir": folder, "resolution": 12}
    with pytest.raises(ValueError, match=r"come from a metadata.csv or metadata.jsonl .*; .* has none"):
        load_images(**options, condition_columns=["t"])
    write_metadata(folder, rows={**ROWS, "gone.png": (1, "x", [1, 2])})
    with pytest.raises(ValueError, match="names 1 images that are not there: 'gone.png'"):
        load_images(**options, label_column="flower")
    write_metadata(folder, rows={"a.png": ROWS["a.png"]})
    with pytest.raises(ValueError, match=r"label_column='flower': 2 of 3 images .* such as 'b/c.png', 'b/d.png'"):
        load_images(**options, label_column="flower")
    with pytest.raises(ValueError, match="label_column='flowr': 3 of 3 images"):
        load_images(**options, label_column="flowr")
    write_metadata(folder)
    write_metadata(folder, "jsonl")
    with pytest.raises(ValueError, match="'a.png' stands in two rows"):
        load_images(**options, label_column="flower")
    (folder / "metadata.jsonl").write_text("[1, 2]")
    with pytest.raises(ValueError, match="line 1 must be a JSON object"):
        load_images(**options, label_column="flower")
    (folder / "metadata.jsonl").write_text("nonsense")
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        load_images(**options, label_column="flower")


def test_metadata_and_folders_of_classes(tmp_path):
    """`label` still means the sub-folders, as in Hugging Face's ImageFolder, unless the metadata has such a column."""
    folder = folder_of(tmp_path, "x/1.png", "y/2.png")
    (folder / "metadata.csv").write_text("file_name,t\nx/1.png,1\n./y/2.png,2\n")
    dataset = load_images(train_data_dir=folder, resolution=12, label_column="label", condition_columns=["t"])
    assert dataset.id2label == {0: "x", 1: "y"} and dataset.condition_columns["mean"] == [1.5]
    (folder / "metadata.csv").write_text("file_name,label\nx/1.png,10\ny/2.png,9\n")
    dataset = load_images(train_data_dir=folder, resolution=12, label_column="label")
    assert [dataset[i]["label"] for i in range(2)] == [1, 0] and dataset.id2label == {0: "9", 1: "10"}


def test_conditions_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "t": [1.0, 2, 6],
        "n": [3, 0, 0],
        "v": [[1.0, 0], [0, 1], [0, 0]],
        "s": ["a", "b", "c"],
        "gap": [1, None, 2],
    }
    features = {
        "t": datasets.Value("float64"), "n": datasets.Value("int8"), "v": datasets.Sequence(datasets.Value("float32"), 2),
        "s": datasets.Value("string"), "gap": datasets.Value("float32"),
    }  # fmt: skip
    path = saved_rows(tmp_path, columns, features)
    dataset = load_images(dataset_name=path, resolution=12, condition_columns=["t", "n", "v"])
    assert dataset.condition_columns["names"] == ["t", "n", "v[0]", "v[1]"]
    assert dataset.condition_columns["mean"] == pytest.approx([3, 1, 1 / 3, 1 / 3])
    normal = torch.stack([dataset[i]["mapping_cond"] for i in range(3)])
    assert normal.mean(0).abs().max() < 1e-6 and (normal.std(0, correction=0) - 1).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"'gap' of .*: 1 of 3 rows .*: 'row 1' \(None\)"):
        load_images(dataset_name=path, resolution=12, condition_columns=["gap"])
    with pytest.raises(ValueError, match="condition_columns='x' is not in"):
        load_images(dataset_name=path, resolution=12, condition_columns=["x"])


def test_statistics_are_of_the_images_that_can_be_read(tmp_path):
    names = [f"{i:03}.png" for i in range(100)]
    folder = folder_of(tmp_path, *names)
    lines = [f"{name},{1e6 if i == 50 else i % 2}" for i, name in enumerate(names)]
    (folder / "metadata.csv").write_text("file_name,t\n" + "\n".join(lines))
    (folder / "050.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 100"):
        dataset = load_images(train_data_dir=folder, resolution=12, condition_columns=["t"])
    assert dataset.condition_columns["mean"] == [pytest.approx(50 / 99)]
    assert dataset[98]["mapping_cond"] > 0 and len(dataset) == 99


# --- Labels that are texts or numbers


def labelled(tmp_path, labels, kind="csv"):
    """Return the data set of a folder whose metadata has these labels."""
    folder = folder_of(tmp_path, *[f"{i}.png" for i in range(len(labels))])
    rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    with open(folder / f"metadata.{kind}", "w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return load_images(train_data_dir=folder, label_column="label", resolution=12)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "labels, names",
    [
        (["01", "1", "01"], ["01", "1"]),
        (["007", "042", "0"], ["0", "007", "042"]),
        (["10001", "94103", "10001"], ["10001", "94103"]),
        (["10", "9", "1"], ["1", "9", "10"]),
        (["2", "1", "a"], ["1", "2", "a"]),
        (["0.5", "10.0", "2.0"], ["0.5", "10.0", "2.0"]),
        (["cat/dog", "日本", "cat/dog"], ["cat/dog", "日本"]),
    ],
)
def test_texts_stay_texts(tmp_path, kind, labels, names, recwarn):
    dataset = labelled(tmp_path, labels, kind)
    assert list(dataset.id2label.values()) == names and not recwarn.list
    assert [dataset.id2label[i] for i in dataset.labels.tolist()] == labels
    assert dataset.class_counts == {name: labels.count(name) for name in names}


def test_numbers_are_class_ids(tmp_path, recwarn):
    dataset = labelled(tmp_path, [2, 0, 1], "jsonl")
    assert dataset.labels.tolist() == [2, 0, 1] and dataset.id2label == {0: "0", 1: "1", 2: "2"} and not recwarn.list
    with pytest.warns(UserWarning, match="1 of 4 classes have no image: '0'. Integer labels are class ids"):
        dataset = labelled(tmp_path / "2", [1, 2, 3], "jsonl")
    assert dataset.labels.tolist() == [1, 2, 3] and dataset.class_counts == {"0": 0, "1": 1, "2": 1, "3": 1}


@pytest.mark.parametrize(
    "kind, labels",
    [("csv", ["-1", "0", "1"]), ("csv", ["nan", "0", "1.0"]), ("jsonl", [-1, 0]), ("jsonl", ["-1", "0"]),
     ("jsonl", [0.0, 1.0]), ("jsonl", ["a", 1]), ("jsonl", [[1], [2]])],
)  # fmt: skip
def test_labels_that_name_no_class(tmp_path, kind, labels):
    with pytest.raises(
        ValueError, match="images': (all are numbers, and .* cannot number a class|. of . labels are of no class)"
    ):
        labelled(tmp_path, labels, kind)


def test_many_classes_of_one_image(tmp_path):
    with pytest.warns(UserWarning, match="6 of 7 classes have one image only: 'c0', 'c1', .* and 1 more"):
        labelled(tmp_path, [f"c{i}" for i in range(6)] + ["d", "d"])


def test_classes_that_look_alike(tmp_path):
    labels = ["cat", "Cat", "dog", "cafe\u0301", "caf\u00e9"]
    with pytest.warns(UserWarning, match="in nothing but case, spaces or .*: 'Cat', 'cafe\u0301', 'caf\u00e9', 'cat'"):
        dataset = labelled(tmp_path, labels, "jsonl")
    assert len(dataset.id2label) == 5


def test_class_summary(tmp_path):
    assert load_images(train_data_dir=FACES, resolution=64).class_summary() is None
    summary = load_images(train_data_dir=FACES, label_column="label", resolution=64).class_summary(limit=2)
    assert re.fullmatch(r"13 classes: [\w-]+ \(\d+\), [\w-]+ \(\d+\) and 11 more", summary)


# --- Metadata files as programs write them


LABELS = {"0.png": "café", "1.png": "日本", "2.png": "a;b"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_encodings_of_metadata(tmp_path, kind, encoding):
    folder = folder_of(tmp_path, *LABELS)
    lines = [f'{name},"{label}"' for name, label in LABELS.items()]
    if kind == "jsonl":
        rows = [{"file_name": name, "label": label} for name, label in LABELS.items()]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\r\n".join((["file_name,label"] if kind == "csv" else []) + lines)
    (folder / f"metadata.{kind}").write_bytes(text.encode(encoding))
    dataset = load_images(train_data_dir=folder, label_column="label", resolution=12)
    assert [dataset.id2label[i] for i in dataset.labels.tolist()] == list(LABELS.values())


@pytest.mark.parametrize(
    "content, message",
    [
        ("file_name,label\n0.png,café\n".encode("latin-1"), r"metadata.csv', line 2, column 'label' is not UTF-8: b'caf\\xe9' .* Save the file as UTF-8"),
        ("file_name,étiquette\n".encode("cp1252"), "metadata.csv', line 1, column 'number 2' is not UTF-8"),
        ("file_name,label\n0.png,x\n".encode("utf-16")[:-1], "metadata.csv' begins as UTF-16 but is not"),
        (b"file_name,label\n0.png,cat, dog\n", r"line 2 has 3 cells for the 2 columns .* contain ',' in double quotes"),
        (b"name,label\n0.png,cat\n", r"must have a header with a column 'file_name' and no column twice; got \['name', 'label'\]"),
        (b"file_name,label,label\n0.png,cat,dog\n", "no column twice"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "metadata.csv'"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_read(tmp_path, content, message):
    folder = folder_of(tmp_path, "0.png")
    (folder / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_images(train_data_dir=folder, label_column="label", resolution=12)
    assert not manifests(tmp_path), "before any image is decoded"


def test_spaces_and_separators_of_metadata(tmp_path):
    folder = folder_of(tmp_path, "000/0.png", "000/1.png", "001/0.png")
    for text in (
        'file_name, label\n000/0.png, cat\n000/1.png , "dog, old" \n001/0.png,cat \n\n',
        'file_name;label\n000/0.png;cat\n000/1.png;"dog, old"\n001/0.png;cat\n;;\n',
        "file_name\tlabel\n000\\0.png\tcat\n.\\000\\1.png\tdog, old\n001\\0.png\tcat\n",
        '"file_name","label"\r"000/0.png","cat"\r"./000/1.png","dog, old"\r"001//0.png","cat",,',
    ):
        (folder / "metadata.csv").write_text(text, newline="")
        dataset = load_images(train_data_dir=folder, label_column="label", resolution=12)
        assert dataset.class_counts == {"cat": 2, "dog, old": 1}, text


def test_long_cells(tmp_path):
    folder, limit = folder_of(tmp_path, "0.png", "1.png"), csv.field_size_limit()
    (folder / "metadata.csv").write_text(f"file_name,caption,label\n0.png,{'word ' * 60_000},cat\n1.png,x,dog\n")
    dataset = load_images(train_data_dir=folder, label_column="label", resolution=12)
    assert dataset.class_counts == {"cat": 1, "dog": 1} and csv.field_size_limit() == limit


def test_a_label_column_that_the_metadata_lacks(tmp_path):
    folder = folder_of(tmp_path, "000/0.png", "001/1.png")
    (folder / "metadata.csv").write_text("file_name,Label\n000/0.png,cat\n001/1.png,dog\n")
    with pytest.warns(UserWarning, match=r"has no column 'label' \(its columns: \['Label'\]\): the sub-folders are"):
        load_images(train_data_dir=folder, label_column="label", resolution=12)
    dataset = load_images(train_data_dir=folder, label_column="Label", class_folder_depth=-1, resolution=12)
    assert dataset.class_counts == {"000": 1, "001": 1}


def test_metadata_of_other_splits(tmp_path):
    folder = folder_of(tmp_path, "train/0.png", "train/1.png", "test/0.png")
    (folder / "metadata.csv").write_text("file_name,label\ntrain/0.png,cat\ntrain/1.png,dog\ntest/0.png,owl\n")
    with pytest.warns(UserWarning, match="leaves out"):
        dataset = load_images(train_data_dir=folder, label_column="label", resolution=12)
    assert dataset.class_counts == {"cat": 1, "dog": 1}
