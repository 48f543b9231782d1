"""Generates a small town that the weights were not trained on, runs inference, and draws and evaluates the result."""

from __future__ import annotations

from collections.abc import Sequence

from perception.cli import SEED, command_parser, number, output_folder

EXAMPLE = """example:
  perception demo
  perception demo --out out/other --seed 90001 --scenes 2 --checkpoint out/nano/nano.safetensors
"""
SPLIT = "town_demo"


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("demo", __doc__, EXAMPLE)
    parser.add_argument(
        "--out", type=output_folder("--out"), default="out/demo", help="folder to write to (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint",
        default="nano",
        help="a .safetensors file, or the name of weights that came with the library (default: %(default)s)",
    )
    parser.add_argument("--seed", type=SEED, default=90000, help="of the town (default: %(default)s, not trained on)")
    parser.add_argument(
        "--scenes", type=number(int, 1, 1000), default=3, help="number of scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--keyframes", type=number(int, 1, 1000), default=8, help="keyframes per scene, 2 Hz (default: %(default)s)"
    )
    parser.add_argument(
        "--min-score",
        type=number(float, 0, 1),
        default=0.3,
        help="score threshold of the picture (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)

    import numpy as np

    from perception.data.nuscenes import NuScenesDataset
    from perception.evaluation.dataset import evaluate_dataset
    from perception.files import replacing, write_json
    from perception.models.checkpoint import load_model, weights_file
    from perception.synthetic import VERSION, simulate
    from perception.types import map_tensors
    from perception.visualization.pictures import draw_frame

    model = load_model(arguments.checkpoint)
    height, width = model.config.image_size
    # The folder is named after its content and appears when it is complete, so it can be used again.
    name = f"town_{arguments.seed}_{arguments.scenes}x{arguments.keyframes}_{height}x{width}"
    root = arguments.out / name
    if not (root / VERSION).is_dir():
        simulate(
            root,
            scenes=arguments.scenes,
            seed=arguments.seed,
            keyframes=arguments.keyframes,
            image_size=(height, width),
            split=SPLIT,
        )
    # Lines are drawn as finely as the map has them.
    dataset = NuScenesDataset(root, VERSION, SPLIT, image_size=(height, width), points_per_line=100)
    evaluation, stream = evaluate_dataset(model, dataset, progress=True)
    print(evaluation.table())

    last = [int(np.flatnonzero(dataset.scene_of_sample == scene)[-1]) for scene in np.unique(dataset.scene_of_sample)]
    busiest = max(last, key=lambda i: int(dataset.gt_boxes(i).valid.sum()))
    for scene, i in enumerate(last):
        clip = map_tensors(lambda tensor: tensor[0], dataset[i])
        picture = draw_frame(
            clip.frames,
            stream.objects[dataset.tokens[i]],
            clip.gt,
            cameras=dataset.cameras,
            caption=f"scene {scene} of a town that was not trained on, after {arguments.keyframes} keyframes",
            min_score=arguments.min_score,
        )
        for path in [arguments.out / f"demo_scene{scene}.png"] + [arguments.out / "demo.png"] * (i == busiest):
            with replacing(path) as beside:
                picture.save(beside, "PNG")

    metrics = evaluation.metrics() | {"fps": 1 / stream.seconds_per_frame}
    headline = {key: metrics[key] for key in ("nds", "mAP", "lane_mAP", "fps")}
    settings = {"checkpoint": weights_file(arguments.checkpoint).name} | {
        key: getattr(arguments, key) for key in ("seed", "scenes", "keyframes")
    }
    write_json(arguments.out / "demo.json", headline | settings)
    print()
    for label, key in (("NDS", "nds"), ("mAP", "mAP"), ("lane mAP", "lane_mAP"), ("frames/s", "fps")):
        print(f"{label:12s}{headline[key]:8.3f}")
    print(f"\npicture: {arguments.out / 'demo.png'}   numbers: {arguments.out / 'demo.json'}")
