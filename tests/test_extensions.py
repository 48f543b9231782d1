"""Parts from outside the package: a hook, a loss, a network, a dataset and a tracker of a config's own folder train;
settings of MMEngine's Runner arrive there, and those that work against training are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, VISBACKENDS

from perception import extensions
from perception.cli import main
from perception.data.loader import collate
from perception.engine.checkpoints import changed_settings, settings_of
from perception.engine.config import CustomDataSection, build_dataset, load_config
from perception.engine.training import TrainingModel, train
from perception.engine.weights import load_weights
from perception.errors import CheckpointError, ConfigError
from perception.models import NETWORKS, register_network
from perception.models.checkpoint import load_model, save_checkpoint
from perception.synthetic import VERSION

PROJECT = Path(__file__).resolve().parent.parent

# The package of a user. Its network is the one of docs/add-a-network.md.
PARTS = """
import json

from mmengine.hooks import Hook
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.visualization import LocalVisBackend

from perception.data.nuscenes import NuScenesDataset
from perception.extensions import register_dataset, register_loss
from perception.models import register_network

from .toy_network import ToyConfig, ToyNetwork


class OwnConfig(ToyConfig):
    @classmethod
    def presets(cls):
        return {"own": cls}


register_network("own", OwnConfig, ToyNetwork)


@register_loss("own_offset")
def own_offset(prediction, gt, frame):
    offset = prediction.params[..., :3].square().mean()
    return {"own_offset": offset, "own_constant": 0 * offset + 3.0}


@register_dataset("Grey")
class Grey(NuScenesDataset):
    def __init__(self, level, root, split, **network):
        super().__init__(root, "v1.0-synthetic", split, **network)
        self.level = level

    def __getitem__(self, item):
        clip = super().__getitem__(item)
        images = clip.frames.images.float() * 0 + self.level
        return clip._replace(frames=clip.frames._replace(images=images.to(clip.frames.images.dtype)))


@HOOKS.register_module()
class OwnHook(Hook):
    def __init__(self, file):
        self.file, self.steps = file, []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        losses = {name: loss.item() for name, loss in outputs.items()}
        self.steps.append({"grey": float(data_batch.frames.images.float().mean()), "losses": losses})

    def after_val_epoch(self, runner, metrics=None):
        with open(self.file, "w") as file:
            json.dump({"steps": self.steps, "nds": metrics["nds"]}, file)


@VISBACKENDS.register_module()
class OwnTracker(LocalVisBackend):
    def add_config(self, config, **others):
        self.config = config

    def close(self):  # as MLflow's, which uploads files of the work directory
        with open(f"{self.config.work_dir}/uploaded", "w") as file:
            file.write(self.config.pretty_text)
"""

CONFIG = """
custom_imports = dict(imports=["own_parts.all"], allow_failed_imports=False)
custom_hooks = [dict(type="OwnHook", file={hook!r}, priority="LOW")]
default_hooks = dict(logger=dict(interval=2))
log_processor = dict(window_size=1)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="OwnTracker", scalar_save_file="own.json")])
env_cfg = dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=1), resource_limit=4096)
model = dict(preset="own")
train_data = val_data = dict(type="Grey", root={root!r}, split="town_val", level=100)
train = dict(
    image_epochs=0, epochs=1, batch_size=1, streams=1, frames_per_clip=2, drop_frames=0.0, lr=2e-3, weight_decay=0.01,
    warmup_iters=2, grad_clip=10.0, ema_momentum=0.0, val_every=1, log_every=1, workers=0,
    extra_losses=dict(own_offset=0.5),
)
"""


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory, town_root) -> Path:
    """A folder outside of the library, with a package and a config that uses it."""
    folder = tmp_path_factory.mktemp("outside")
    package = folder / "own_parts"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "all.py").write_text(PARTS)
    shutil.copy(PROJECT / "tests" / "toy_network.py", package)
    (folder / "own.py").write_text(CONFIG.format(hook=str(folder / "hook.json"), root=str(town_root)))
    return folder


@pytest.fixture(scope="module")
def trained(own_folder) -> Path:
    """The folder after a training by its config; everything is registered as long as the module runs."""
    path, modules = list(sys.path), set(sys.modules)
    tables = [NETWORKS, extensions.LOSSES, extensions.DATASETS, HOOKS.module_dict, VISBACKENDS.module_dict]
    before = [dict(table) for table in tables]
    train(load_config(own_folder / "own.py"), own_folder / "work", seed=1)
    yield own_folder
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("own_parts"):
            del sys.modules[name]
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def test_a_config_brings_a_hook_a_loss_a_network_and_a_dataset(trained):
    recorded = json.loads((trained / "hook.json").read_text())
    assert len(recorded["steps"]) == 4  # 2 scenes x 2 windows of 2 frames
    for step in recorded["steps"]:
        losses = step["losses"]
        assert step["grey"] == 100 and losses["own_constant"] == 1.5 and losses["own_offset"] > 0
        assert losses["loss"] == pytest.approx(sum(loss for name, loss in losses.items() if name != "loss"), rel=1e-5)
    weights = trained / "work" / "own-last.safetensors"
    network = load_model(weights)
    assert (type(network).__module__, network.config.presets().keys()) == ("own_parts.toy_network", {"own"})
    assert load_weights(weights, load_config(trained / "own.py").model).config == network.config


def test_settings_reach_the_runner(trained):
    """The tracker of the config alone writes scalars, of every second step, without a mean over steps."""
    assert not list(trained.glob("work/*/vis_data/events.*"))
    assert "OwnTracker" in (trained / "work" / "uploaded").read_text()
    assert load_config(trained / "work" / "own.py").runner == load_config(trained / "own.py").runner  # the copy there
    (file,) = trained.glob("work/*/vis_data/own.json")
    logged = [line for line in map(json.loads, file.read_text().splitlines()) if "loss" in line]
    steps = json.loads((trained / "hook.json").read_text())["steps"]
    assert [line["step"] for line in logged] == [2, 4]
    assert [line["loss"] for line in logged] == pytest.approx([steps[k]["losses"]["loss"] for k in (1, 3)], rel=1e-5)


def test_a_config_as_data_may_name_what_is_registered(trained):
    """As after `--import own_parts.all`: a YAML config imports nothing by itself."""
    source = load_config(trained / "own.py").source.to_dict()
    del source["custom_imports"]
    (trained / "own.json").write_text(json.dumps(source))
    read, wanted = load_config(trained / "own.json"), load_config(trained / "own.py")
    assert (read.train, read.train_data, read.runner) == (wanted.train, wanted.train_data, wanted.runner)


def test_a_hook_that_is_never_called_is_refused(trained):
    hook = type("OnlyTests", (Hook,), {"after_test_iter": print, "after_val_iter": print})
    HOOKS.register_module(module=hook)
    with pytest.raises(ConfigError, match="OnlyTests has only after_test_iter, after_val_iter, which streaming"):
        load_config(trained / "own.py", {"custom_hooks": [{"type": "OnlyTests"}]})


def test_extra_losses_have_gradients_and_are_checked(trained):
    config = load_config(trained / "own.py")
    clip = collate([build_dataset(config.train_data, config.model)[0]])
    core = load_model(trained / "work" / "own-last.safetensors")
    losses, _ = TrainingModel(core, (), {"own_offset": 2.0})(clip, None)
    losses["own_offset"].backward()
    norms = [p.grad.norm() for p in core.parameters() if p.grad is not None]
    assert losses["own_constant"] == 6.0 and sum(norms) > 0
    for returned, message in (
        (torch.zeros(()), "returns .*; return scalars by name"),
        ({"box_class": torch.zeros(())}, "'box_class', which exists"),
        ({"x": torch.zeros(3)}, "return scalars"),
    ):
        extensions.LOSSES["wrong"] = lambda prediction, gt, frame, returned=returned: returned
        with pytest.raises(ConfigError, match=f"the loss wrong of train.extra_losses .*{message}"):
            TrainingModel(core, (), {"wrong": 1.0})(clip, None)
    del extensions.LOSSES["wrong"]


def test_weights_of_a_network_from_outside_name_its_module(trained, monkeypatch, tmp_path):
    weights = trained / "work" / "own-last.safetensors"
    monkeypatch.delitem(NETWORKS, "own")
    with pytest.raises(CheckpointError, match=r"'?own.* is unknown here; add --import own_parts\.toy_network, or name"):
        main(["export", str(weights), "--out", str(tmp_path / "out")])
    monkeypatch.delitem(NETWORKS, "bev_transformer")
    with pytest.raises(CheckpointError, match="use a newer version"):
        load_model("nano")


@pytest.mark.slow
def test_commands_take_weights_of_a_network_from_outside(trained, town_root):
    """In fresh processes: `evaluate` by the config, `predict` by `--import`, each with what the other one needs."""

    def run(*arguments) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PROJECT}"}
        command = [sys.executable, "-m", "perception", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=trained)

    weights = trained / "work" / "own-last.safetensors"
    done = run("evaluate", "own.py", weights, "--json", "numbers.json")
    assert done.returncode == 0, done.stderr
    nds = json.loads((trained / "hook.json").read_text())["nds"]
    assert json.loads((trained / "numbers.json").read_text())["nds"] == pytest.approx(nds, abs=1e-6)
    sample = ("--dataroot", town_root, "--version", VERSION, "--split", "town_val", "--out", "sample.png")
    done = run("predict", *sample, "--checkpoint", weights)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "add --import own_parts.toy_network" in done.stderr
    done = run("predict", *sample, "--checkpoint", weights, "--import", "own_parts.all")
    assert done.returncode == 0 and (trained / "sample.png").is_file(), done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train_cfg = dict(max_epochs=3)", "train_cfg is set elsewhere: .*set train.epochs and train.val_every"),
        ("resume = True", "resume is set elsewhere: add --resume"),
        ("randomness = dict(seed=1)", "add --seed to the command"),
        ("optim_wrapper = dict()", "set train.lr"),
        ("custom_hook = []", "unknown key custom_hook; did you mean custom_hooks"),
        ("custom_hooks = dict(type='EmptyCacheHook')", "write a list of dict"),
        ("custom_hooks = ['EmptyCacheHook']", r"custom_hooks\[0\] is .*; write dict\(type"),
        ("custom_hooks = [dict(type='CheckpointHook')]", r"custom_hooks\[0\] is a CheckpointHook: training writes its"),
        ("custom_hooks = [dict(type='EMAHook')]", "set train.ema_momentum"),
        ("custom_hooks = [dict(type='mmengine.hooks.EMAHook')]", "set train.ema_momentum"),
        ("custom_hooks = [dict(type='EarlyStoppingHook', monitor='nds')]", "runs all epochs"),
        ("custom_hooks = [dict(type='EmptyCachHook')]", "not registered in MMEngine; did you mean EmptyCacheHook"),
        ("custom_hooks = [dict(type='EmptyCacheHook', after=1)]", "does not fit .*EmptyCacheHook.*'after'"),
        ("custom_hooks = [dict(type='EmptyCacheHook', priority='FIRST')]", "priority is .*give 0 to 100"),
        ("custom_hooks = [dict(type='perception.types.Frame')]", "does not fit|no Hook of MMEngine"),
        ("default_hooks = dict(checkpoint=dict(interval=2))", "default_hooks.checkpoint cannot be changed"),
        ("default_hooks = dict(sampler_seed=None)", "default_hooks.sampler_seed cannot be changed"),
        ("default_hooks = dict(logger=None)", "default_hooks.logger is null or missing"),
        ("default_hooks = dict(logger=dict(interva=1))", "does not fit .*'interva'"),
        ("default_hooks = dict(logger=dict(type='EmptyCacheHook'))", "give LoggerHook or a class derived"),
        ("visualizer = dict(type='Visualizer')", r"visualizer.vis_backends is null or missing; write a list"),
        ("visualizer = dict(vis_backends=[dict()])", r"vis_backends\[0\] is .*; write dict"),
        ("visualizer = dict(vis_backends=[dict(type='WandbBackend')])", "did you mean WandbVisBackend"),
        ("log_processor = dict(window=3)", "log_processor does not fit .*'window'"),
        ("env_cfg = dict(dist_cfg=dict(backend='gloo'))", "env_cfg.dist_cfg cannot be set: processes use NCCL"),
        ("env_cfg = dict(cudnn_benchmark=1)", "must be of type bool"),
        ("env_cfg = dict(cudnn=True)", "env_cfg.cudnn is unknown; the keys there are cudnn_benchmark"),
        ("env_cfg = dict(mp_cfg=dict(mp_start_method='thread'))", "give one of fork, spawn, forkserver"),
        ("load_from = 3", "load_from is 3; give the path"),
        ("load_from = 'a.pth'\ntrain = dict(init_from='b.pth')", "name different weights"),
        ("custom_imports = ['own']", "write dict"),
        ("custom_imports = dict(imports=['no_such_module'])", "no module no_such_module; put it on PYTHONPATH"),
        ("custom_imports = dict(imports=['own.py'], allow_failed_imports=True)", "would hide a missing module"),
        ("custom_imports = dict(imports=['../own'])", "write the name of a module"),
        ("custom_imports = dict(imports=['failing_module'])", r"fails when it is imported \(ZeroDivision.*py:2\)"),
        ("custom_imports = dict(imports=['needing_module'])", "needs package_of_nobody, which is not installed"),
        ("train = dict(extra_losses=dict(none=1.0))", "extra_losses names .*which is not registered"),
        ("train_data = dict(_delete_=True, type='None')", "train_data.type names .*not registered"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, change, message):
    (tmp_path / "failing_module.py").write_text("\n1 / 0\n")
    (tmp_path / "needing_module.py").write_text("import package_of_nobody\n")
    path = tmp_path / "mine.py"
    path.write_text(f"_base_ = ['{PROJECT}/configs/synthetic/overfit.py']\n{change}\n")
    before = list(sys.path)
    try:
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(path)
    finally:
        sys.path[:] = before
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(
        f"_base_ = ['{PROJECT}/configs/synthetic/overfit.py']\n"
        "visualizer = dict(type='Visualizer', vis_backends=[dict(type='MLflowVisBackend', exp_name='one')])\n"
    )
    config = load_config(path)
    arguments = {"custom_hooks": [], "default_hooks": {}, "visualizer": {}, "log_processor": {}, "env_cfg": {}}
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"MLflowVisBackend, and mlflow cannot be imported .*pip install mlflow"):
        config.runner.over(arguments)
    monkeypatch.setitem(sys.modules, "mlflow", sys)
    assert config.runner.over(arguments)["visualizer"]["vis_backends"][0]["exp_name"] == "one"


def test_only_settings_that_change_what_is_learned_are_compared(tmp_path):
    path = tmp_path / "mine.py"

    def settings(text: str):
        path.write_text(f"_base_ = ['{PROJECT}/configs/synthetic/overfit.py']\n{text}")
        return settings_of(load_config(path))

    plain, tracked = settings(""), settings("log_processor = dict(window_size=3)\ndefault_hooks = dict(logger=dict())")
    assert changed_settings(path, plain, tracked, False) == {}
    earlier = {key: value for key, value in plain.items() if key not in ("custom_hooks", "train.extra_losses")}
    assert earlier != plain and changed_settings(path, earlier, plain, False) == {}  # of a version without them
    hooked = settings("custom_hooks = [dict(type='EmptyCacheHook', after_iter=True)]")
    with pytest.raises(ConfigError, match=r"custom_hooks .* -> .*; add --allow-change"):
        changed_settings(path, plain, hooked, False)
    assert changed_settings(path, plain, hooked, True).keys() == {"custom_hooks"}
    started = settings("load_from = 'a.safetensors'")
    assert started == settings("train = dict(init_from='a.safetensors')") != plain


def test_names_are_taken_once_and_networks_keep_the_protocol(monkeypatch, small_network, tmp_path):
    kind = type(small_network)
    register_network("bev_transformer", *NETWORKS["bev_transformer"])  # the same again
    with pytest.raises(ConfigError, match=r"'maptr', and perception.models.maptr.config.MapTRConfig has this name"):
        register_network("maptr", *NETWORKS["bev_transformer"])
    with pytest.raises(ConfigError, match=r"lacks extra_inputs, .*docs/add-a-network.md"):
        register_network("other", type(small_network.config), torch.nn.Module)

    class Other(type(small_network.config)):
        pass

    with pytest.raises(ConfigError, match="'other' has a preset 'base', as another network has"):
        register_network("other", Other, kind)
    extensions.register_dataset("one")(dict)
    extensions.register_dataset("one")(dict)
    with pytest.raises(ConfigError, match=r"a dataset 'one', and builtins.dict has this name"):
        extensions.register_dataset("one")(list)
    del extensions.DATASETS["one"]
    save_checkpoint(tmp_path / "a.safetensors", small_network, {})
    assert b'"module"' not in (tmp_path / "a.safetensors").read_bytes()[:4000]  # of the library


def test_a_dataset_that_lacks_something_is_named(trained):
    config = load_config(trained / "own.py", {"train_data.colour": 3})
    with pytest.raises(ConfigError, match=r"the dataset Grey cannot be made with .*'colour'"):
        build_dataset(config.train_data, config.model)
    with pytest.raises(ConfigError, match=r"the dataset Grey does not fit own_parts\.all\.Grey: .*'root'"):
        build_dataset(CustomDataSection("Grey", {"level": 3}), config.model)
    extensions.DATASETS["bare"] = lambda **network: [1, 2]
    section = CustomDataSection("bare", {})
    with pytest.raises(ConfigError, match=r"the dataset bare: builtins.list lacks tokens, scene_of_sample"):
        build_dataset(section, config.model)
    del extensions.DATASETS["bare"]
