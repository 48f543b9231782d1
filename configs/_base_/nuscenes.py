"""nuScenes: unpack the full dataset (v1.0) and the map expansion (v1.3) under data/nuscenes first."""

train_data = dict(dataroot="data/nuscenes", version="v1.0-trainval", split="train", augment=dict())
val_data = dict(dataroot="data/nuscenes", version="v1.0-trainval", split="val")
