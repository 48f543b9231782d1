"""Live use of a network: the PyTorch predictor, and what it shares with the torch-free runtime of an export.

- `predictor`: runs a PyTorch network on one frame after another.
- `sequence`: runs a network over the frames of a dataset.
- `fitting`: resizes and crops images to the input size of a network.
- `result`: writes results as JSON and reads them; `result.schema.json` is their JSON Schema.
- `checks`: checks images, calibration, poses and times.
- `ego_motion`: computes the motion between frames from poses and times.

This package imports nothing, and `checks` and `ego_motion` need numpy alone: the in-vehicle
`perception.export.runtime.Runtime` uses them without PyTorch.
"""
