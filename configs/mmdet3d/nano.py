r"""Our nano trained and tested by mmdet3d's own Runner, tools, dataset and metric, on a town in nuScenes' layout.

    perception simulate --out data/nuscenes --scenes 10 --version v1.0-mini
    python -m perception.mmdet3d create_data nuscenes --root-path ./data/nuscenes --out-dir ./data/nuscenes \
        --extra-tag nuscenes --version v1.0-mini
    python -m perception.mmdet3d train configs/mmdet3d/nano.py --work-dir out/mmdet3d
    python -m perception.mmdet3d test configs/mmdet3d/nano.py out/mmdet3d/epoch_24.pth

For nuScenes itself set `version` to "v1.0-trainval" here and leave --version out of create_data. It starts from the
shipped weights; without `weights` the network learns from nothing. Boxes are trained, the lines that the network also
finds are not, because mmdet3d's infos hold none. Its frames come in the order of the drive, so that it learns with its
memory.
"""

custom_imports = dict(imports=["perception.mmdet3d"], allow_failed_imports=False)
default_scope = "mmdet3d"

version = "v1.0-mini"
data_root = "data/nuscenes/"
image_size = (176, 448)

model = dict(type="perception.Detector", network=dict(preset="nano", image_size=image_size), weights="nano")

pack = dict(type="perception.PackFrame", image_size=image_size)
dataset = dict(
    type="NuScenesDataset",
    data_root=data_root,
    data_prefix={
        "pts": "samples/LIDAR_TOP",
        "CAM_FRONT": "samples/CAM_FRONT",
        "CAM_FRONT_RIGHT": "samples/CAM_FRONT_RIGHT",
        "CAM_FRONT_LEFT": "samples/CAM_FRONT_LEFT",
        "CAM_BACK": "samples/CAM_BACK",
        "CAM_BACK_LEFT": "samples/CAM_BACK_LEFT",
        "CAM_BACK_RIGHT": "samples/CAM_BACK_RIGHT",
    },
    modality=dict(use_camera=True, use_lidar=False),
    metainfo=dict(version=version),
    box_type_3d="LiDAR",
    use_valid_flag=True,
    filter_empty_gt=False,
)
train_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="nuscenes_infos_train.pkl",
        pipeline=[dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True), pack],
    ),
)
val_dataloader = test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**dataset, ann_file="nuscenes_infos_val.pkl", pipeline=[pack], test_mode=True),
)
val_evaluator = test_evaluator = dict(
    type="NuScenesMetric",
    data_root=data_root,
    ann_file=data_root + "nuscenes_infos_val.pkl",
    metric="bbox",
    modality=dict(use_camera=True, use_lidar=False),
)

train_cfg = dict(by_epoch=True, max_epochs=24, val_interval=24)
val_cfg = test_cfg = dict()
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, weight_decay=0.01),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=24, eta_min_ratio=0.01, by_epoch=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=20),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    visualization=dict(type="Det3DVisualizationHook"),
)
# The losses of lines are left out, so the weights of the line decoder get no gradients.
find_unused_parameters = True
