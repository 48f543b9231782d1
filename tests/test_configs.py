"""Config files: the shipped ones are valid, and every mistake is named in one sentence."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from perception.data.augment import Augment
from perception.data.loader import ClipRequest
from perception.engine.config import build_dataset, load_config, model_config
from perception.engine.config_file import parse_options
from perception.errors import ConfigError, DataError
from perception.evaluation.dataset import all_gt_lines
from perception.models import build_network, preset_config
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.types import LaneRange

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Those in `mmdet3d` are configs of mmdet3d, see tests/test_mmdet3d.py.
SHIPPED = sorted(
    path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("[a-z]*/*.py") if path.parent.name != "mmdet3d"
)
NANO = CONFIGS / "synthetic" / "nano.py"

MINIMAL = """
model = dict(preset="nano")
train_data = dict(dataroot="d", version="v", split="s")
val_data = dict(dataroot="d", version="v", split="s")
train = dict(epochs=1, batch_size=2, streams=1, frames_per_clip=2, drop_frames=0.0, image_epochs=0, lr=1,
weight_decay=0.0,
             warmup_iters=1, grad_clip=1.0, ema_momentum=0.0, val_every=1, log_every=1, workers=0)
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_valid_and_documented(name):
    config = load_config(CONFIGS / name)
    assert config.val_data.augment is None
    text = (CONFIGS / name).read_text()
    if config.train is None:
        assert f"perception evaluate configs/{name}" in text and "perception import-checkpoint" in text
        return
    assert config.train.epochs > 0
    assert f"perception train configs/{name} --work-dir" in text.replace("\\\n    ", "")


def test_values_reach_the_parsed_config(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINIMAL)
    options = parse_options(
        ["train.lr=3e-4", "model.grid=[40, 60]", "model.backbone=resnet34", "train_data.augment={'mirror': 0}"]
    )
    config = load_config(path, options)
    assert config.name == "mine"
    assert config.train.lr == 3e-4
    assert config.model == BEVTransformerConfig.preset("nano", grid=(40, 60), backbone="resnet34")
    assert config.train_data.augment == Augment(mirror=0.0) and config.val_data.augment is None
    assert isinstance(load_config(path).train.lr, float)  # written as 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("batch_size", "batchsize"), r"mine\.py: unknown key train\.batchsize; did you mean train\.batch_size\?"),
        (("model = dict(", "model = dict(depht_bins=3, "), r"model\.depht_bins; did you mean model\.depth_bins\?"),
        (('preset="nano"', 'preset="nanno"'), r"preset is 'nanno'; use one of nano"),
        (('preset="nano"', "channels=64"), r"model\.preset is missing; add it"),
        (('split="s"', 'split="s", cameras=6'), r"unknown key train_data\.cameras; the keys there are augment"),
        (("epochs=1, ", ""), r"train\.epochs is missing; add it"),
        (("epochs=1,", "epochs=1.5,"), r"train\.epochs is 1\.5; it must be of type int"),
        (("lr=1,", "lr='1',"), r'train\.lr is "1"; it must be of type float'),
        (("model = dict", "modle = dict"), r"unknown key modle; did you mean model\?"),
        (("train = dict(epochs", "train = int(epochs"), r"mine\.py: TypeError"),
        (('model = dict(preset="nano")', "model = 3"), r"model is 3; it must be a dict"),
        (("train = dict(", "train = dict(("), r"mine\.py: SyntaxError"),
    ],
)
def test_mistakes_in_a_config_are_named(tmp_path, change, sentence):
    path = tmp_path / "mine.py"
    assert change[0] in MINIMAL
    path.write_text(MINIMAL.replace(*change))
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ("train.lr", r'--cfg-options "train\.lr" is not KEY=VALUE'),
        ("train.lrr=1", r"unknown key train\.lrr; did you mean train\.lr\?"),
        ("train.lr.x=1", r"--cfg-options .* does not fit"),
        ("other=1", r"unknown key other"),
        ("model.grid=3", r"model\.grid is 3; it must be of type tuple\[int, int\]"),
    ],
)
def test_bad_options_are_named(pair, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(NANO, parse_options([pair]))


def test_options_for_a_missing_section():
    path = CONFIGS / "nuscenes" / "bevformer_base.py"  # for evaluation only
    with pytest.raises(ConfigError, match=r"train\.lr: .* has no train; its sections: model, val_data"):
        load_config(path, {"train.lr": 1e-4})


def test_a_missing_config_or_dataset_names_the_fix(tmp_path):
    with pytest.raises(
        ConfigError, match=r"absent\.py is neither a file nor a config of the library; give .* nuscenes/b"
    ):
        load_config(tmp_path / "absent.py")
    config = load_config(NANO, {"train_data.dataroot": str(tmp_path / "town")})
    with pytest.raises(DataError, match=r"town/v1\.0-synthetic does not exist; give the root"):  # no command makes it
        build_dataset(config.train_data, config.model)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("synthetic/")])
def test_the_commands_of_a_config_make_exactly_what_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["perception"])
    config = load_config(CONFIGS / name)
    assert config.train_data is not None
    for data in (config.train_data, config.val_data):
        roots = sorted({data.dataroot} if isinstance(data.dataroot, str) else set(data.dataroot))
        (tmp_path / roots[0] / data.version).mkdir(parents=True, exist_ok=True)
        for root in roots[1:]:
            with pytest.raises(DataError, match="make it with: ") as error:
                build_dataset(data, config.model)
            commands = str(error.value).partition("make it with: ")[2].split(" && ")
            made = {part.partition("--out ")[2].split()[0] for part in commands}
            assert made == {missing for missing in roots if not Path(missing).is_dir()}
            assert all(f"--split {data.split}" in part for part in commands)
            Path(root, data.version).mkdir(parents=True)


def test_shipped_configs_have_names(tmp_path, monkeypatch):
    """A user of a wheel has no folder of configs; a file of that path is taken before the name."""
    monkeypatch.chdir(tmp_path)
    for name in ("synthetic/nano", "synthetic/nano.py", "configs/synthetic/nano.py"):
        assert load_config(name).train == load_config(NANO).train  # with all of its `_base_`
    with pytest.raises(ConfigError, match=r"config nano is neither .*; did you mean synthetic/nano\?"):
        load_config("nano")
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "nano.py").write_text(MINIMAL)
    assert load_config("synthetic/nano.py").train.epochs == 1


def test_one_lane_range_decides_anchors_ground_truth_and_evaluation(town_root, tmp_path):
    section = f"dataroot={str(town_root)!r}, version='v1.0-synthetic', split='town_val'"
    path = tmp_path / "mine.py"
    path.write_text(MINIMAL.replace('dataroot="d", version="v", split="s"', section))
    far = {"60x30": 0.0, "100x50": 0.0, "40x20": 0.0}
    for text in far:
        config = load_config(path, {"model.lane_range": text, "train_data.augment": {}})
        assert config.model.lane_range == LaneRange.parse(text) and isinstance(config.model.lane_range, LaneRange)
        half = np.array(config.model.lane_range) / 2
        anchors = 10 * build_network(config.model).line_decoder.anchors
        assert anchors.abs().amax((0, 1))[0].item() == pytest.approx(half[0])
        dataset = build_dataset(config.train_data, config.model)
        lines = dataset[ClipRequest(tuple(range(4)), -1, (0,))].gt.lines  # augmented
        far[text] = lines.points[lines.valid].abs().amax((0, 1))[0].item()
        assert far[text] <= half[0] + 2.0  # the patch lies around LIDAR_TOP, 0.94 m ahead
        ranges = all_gt_lines(dataset), all_gt_lines(dataset, lane_range=config.model.lane_range)
        assert all(len(a) == len(b) for a, b in zip(*(part.values() for part in ranges), strict=True))
    assert far["40x20"] < 22 < far["60x30"] < 32 < 45 < far["100x50"]
    for wrong in ("60", "60x0", "-60x30", (60.0,), 7):
        with pytest.raises(
            ConfigError, match=r'model\.lane_range is .*; write metres along x and along y, e\.g\. "60x30"'
        ):
            load_config(path, {"model.lane_range": wrong})
    assert load_config(path, {"model.lane_range": (100, 50)}).model.lane_range == LaneRange(100.0, 50.0)


def test_a_published_network_trains_on_lines_of_its_own_range():
    assert preset_config("maptr_tiny_r50_24e_gkt").lane_range == LaneRange(60.0, 30.0)  # LiDAR's y looks ahead
    wide = dataclasses.replace(
        preset_config("maptrv2_nusc_r50_24ep"), point_cloud_range=(-25.0, -50.0, -3.0, 25.0, 50.0, 3.0)
    )
    assert wide.lane_range == LaneRange(100.0, 50.0)


def test_none_is_a_value_where_a_field_may_have_none():
    preset = "sparse4dv3_temporal_r50_1x8_bs6_256x704"
    assert model_config(dict(preset=preset, best_cameras=2), "a.py").best_cameras == 2
    assert model_config(dict(preset=preset, best_cameras=None), "a.py").best_cameras is None
    with pytest.raises(ConfigError, match=r"a\.py: model\.groups is null or missing; it must be of type int"):
        model_config(dict(preset=preset, groups=None), "a.py")


def test_configs_as_data_have_the_same_keys_and_run_nothing(tmp_path, monkeypatch):
    """YAML and JSON, for configs that people take from others; a base may be one of the library, never a program."""
    (tmp_path / "below.yaml").write_text("_base_: synthetic/nano\nmodel: {image_size: [96, 160]}\n")
    (tmp_path / "mine.json").write_text('{"_base_": ["below.yaml"], "train": {"epochs": 3}}')
    config, base = load_config(tmp_path / "mine.json", {"train.lr": 1e-4}), load_config(NANO)
    assert config.model == dataclasses.replace(base.model, image_size=(96, 160))
    assert config.train == dataclasses.replace(base.train, epochs=3, lr=1e-4)
    assert config.train_data == base.train_data and config.name == "mine"
    config.source.dump(tmp_path / "copy.yaml")  # as a training does
    assert load_config(tmp_path / "copy.yaml").train == config.train

    canary = tmp_path / "canary"
    program = f"open({str(canary)!r}, 'w').write('run')"
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "canary_module.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    for text, message in (
        ("_base_: program.py\n", "_base_ program.py is neither a file nor a config of the library"),
        (f"_base_: {tmp_path}/program.py\n", "is neither a file nor a config of the library"),
        (
            "_base_: synthetic/nano\ncustom_imports: {imports: [canary_module]}\n",
            "custom_imports runs code, and a .yaml",
        ),
        ("_base_: synthetic/nano\ncustom_hooks: [{type: canary_module}]\n", "not registered in MMEngine"),
        ("_base_: synthetic/nano\ncustom_hooks: [{type: canary_module.Hook}]\n", "not registered in MMEngine"),
        (
            f"_base_: synthetic/nano\nlog_processor: {{type: builtins.open, file: {canary}, mode: w}}\n",
            "not registered",
        ),
        ("_base_: synthetic/nano\nvisualizer: {vis_backends: [{type: canary_module}]}\n", "not registered"),
        (
            "_base_: synthetic/nano\ncustom_hooks: [{type: ProfilerHook, on_trace_ready: {type: canary_module.f}}]\n",
            "has a `type` or `_scope_` inside",
        ),
        (f"model: !!python/object/apply:builtins.open [{canary}, w]\n", "cannot be read"),
        ("_base_: evil.yaml\n", "leads back to itself"),
        ("_base_: none.yaml\n", "is not a file"),
        ("_base_: [3]\n", "_base_ is"),
        ("- 1\n", "holds no sections"),
        ("", "holds no sections"),
        ("model: [\n", "cannot be read"),
        ("_base_: synthetic/nano\nmodel: 3\n", "model is 3; it must be a dict"),
    ):
        (tmp_path / "evil.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "evil.yaml")
    assert not canary.exists()
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"neither \.py nor"):
        load_config(tmp_path / "mine.txt")
